"""What a world needs of the network before it can meet: names, ports and interfaces; each fault is one line."""

import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from moe_mamba.errors import UserError

T = TypeVar("T")
Say = Callable[[str], None]
Resolve = Callable[..., list[Any]]  # as socket.getaddrinfo
# No machine's (RFC 5737): the way there is the default route.
ELSEWHERE = "198.51.100.1"
# Of bridges and tunnels on one machine: others of that name elsewhere have the same addresses.
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "podman", "tun")


@dataclass(frozen=True)
class Patience:
    """How long what may come late is waited for, in seconds.

    Attributes:
        name: for a host name: a cluster's name server knows a new pod after half a minute and more.
        arrival: for rank 0's port, and for all ranks: machines of a job start minutes apart.
        answer: for rank 0's store to answer at its port.
        silence: before the screen says what is waited for.
        pause: between two tries.
    """

    name: float = 300.0
    arrival: float = 600.0
    answer: float = 20.0
    silence: float = 5.0
    pause: float = 0.5

    def retry(self, attempt: Callable[[], T], seconds: float, say: Callable[[OSError], None]) -> T:
        """The result of `attempt`, tried again for `seconds` while it raises OSError; `say` is called once.

        Raises:
            OSError: that of the last try.
        """
        begin, is_said = time.monotonic(), False
        while True:
            try:
                return attempt()
            except OSError as error:
                waited = time.monotonic() - begin
                if waited > seconds:
                    raise
                if waited >= self.silence and not is_said:
                    say(error)
                    is_said = True
            time.sleep(self.pause)


def wait_for_name(host: str, patience: Patience, say: Say, resolve: Resolve = socket.getaddrinfo) -> str:
    """The first address of a host name, which may become known late.

    Args:
        host: a name, or an address.
        patience: how long.
        say: prints a line.
        resolve: asks for addresses, as ``socket.getaddrinfo`` does.

    Raises:
        UserError: the name stays unknown.
    """
    try:
        found = patience.retry(
            lambda: resolve(host, None, type=socket.SOCK_STREAM),
            patience.name,
            lambda error: say(f"waiting   for the host name {host} (MASTER_ADDR) to resolve: {reason(error)}"),
        )
    except (OSError, UnicodeError) as error:  # a label of 64 letters is the latter
        raise UserError(
            f"MASTER_ADDR={host} does not resolve on {socket.gethostname()}: {reason(error)} "
            f"(waited {patience.name:g} s): correct it, or enter it in the name server or /etc/hosts"
        ) from None
    return str(found[0][4][0])


def wait_for_port(host: str, port: int, patience: Patience, say: Say) -> None:
    """Wait until something listens at rank 0's port.

    Raises:
        UserError: nothing does in time.
    """

    def connect() -> None:
        socket.create_connection((host, port), timeout=5).close()

    try:
        patience.retry(
            connect,
            patience.arrival,
            lambda error: say(f"waiting   for rank 0 at {host}, port {port}: {reason(error)}"),
        )
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot reach rank 0 at {host}, port {port}: {reason(error)} (waited "
            f"{patience.arrival:g} s): rank 0 ended or did not start, MASTER_ADDR is not its machine, or a firewall "
            "closes the port"
        ) from None


def check_port(port: int) -> None:
    """Refuse a port that this process cannot open.

    Raises:
        UserError: it is taken, or only for root.
    """
    try:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=is_dual).close()
    except OSError as error:
        what = "is taken" + _holder(port) if error.errno == errno.EADDRINUSE else f"cannot be opened ({reason(error)})"
        raise UserError(
            f"port {port} (MASTER_PORT) {what} on {socket.gethostname()}: give another, with --master_port under "
            "deepspeed, with MASTER_PORT elsewhere"
        ) from None


def family_of(address: str) -> socket.AddressFamily:
    """IPv4's or IPv6's, of an address in numbers."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def is_own_address(address: str) -> bool:
    """Whether an address is one of this machine's."""
    with contextlib.suppress(OSError), socket.socket(family_of(address), socket.SOCK_STREAM) as asked:
        asked.bind((address, 0))
        return True
    return False


def is_loopback(address: str) -> bool:
    """Whether an address leads nowhere but to the machine that uses it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


def interface_fault(environment: Mapping[str, str]) -> str | None:
    """What is wrong with the interfaces that GLOO_SOCKET_IFNAME names; None: nothing, or it is not set.

    Args:
        environment: such as ``os.environ``.
    """
    names, there = environment.get("GLOO_SOCKET_IFNAME", ""), psutil.net_if_addrs()
    if all(name in there for name in names.split(",") if names):
        return None
    return f"GLOO_SOCKET_IFNAME={names}, but the interfaces of {socket.gethostname()} are {', '.join(sorted(there))}"


def loopback_fault(
    environment: Mapping[str, str], master: str, host: str | None = None, resolve: Resolve = socket.getaddrinfo
) -> str | None:
    """Why other machines could not reach what gloo will listen on here; None: they can, as far as this machine knows.

    Args:
        environment: such as ``os.environ``.
        master: rank 0's address, towards which the interface leads that is proposed.
        host: the machine's name; None: what the system says.
        resolve: asks for addresses, as ``socket.getaddrinfo`` does.
    """
    host = host or socket.gethostname()
    interfaces = usable_interfaces(master)
    way = f"set GLOO_SOCKET_IFNAME={next(iter(interfaces))} there, or " if interfaces else ""
    way += f"enter its address in {host}'s /etc/hosts"
    if names := environment.get("GLOO_SOCKET_IFNAME"):
        if set(names.split(",")) <= interfaces.keys():
            return None
        return f"GLOO_SOCKET_IFNAME={names} of {host} is down or loopback, where no other machine reaches it: {way}"
    addresses = host_addresses(host, resolve)
    address = gloo_address(environment, addresses)
    if address is not None and not is_loopback(address):
        return None
    what = f"resolves to {address or addresses[0]}" if addresses else "does not resolve"
    return f"the host name {host} {what} on its own machine, where no other machine reaches it: {way}"


def host_addresses(host: str | None = None, resolve: Resolve = socket.getaddrinfo) -> list[str]:
    """What a host name, by default this machine's, resolves to here, in the order in which gloo tries it."""
    try:
        found = resolve(host or socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def gloo_address(environment: Mapping[str, str], addresses: Sequence[str]) -> str | None:
    """Where gloo will listen: at the interface that it is told, or at the first own address of the host name.

    None: there is no such interface, or the name leads elsewhere, so that it takes loopback
    (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp). Gloo makes groups on GPUs as well: checkpoints use one.

    Args:
        environment: such as ``os.environ``.
        addresses: of the host name, as `host_addresses` gives them.
    """
    if name := environment.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]:
        return next(iter(_addresses(name)), None)
    return next(filter(is_own_address, addresses), None)


def usable_interfaces(towards: str) -> dict[str, str]:
    """Name -> address of the interfaces that are up and more than loopback; first the one that leads `towards`."""
    found: dict[str, str] = {}
    states = psutil.net_if_stats()
    for name in psutil.net_if_addrs():
        own = [address for address in _addresses(name) if not is_loopback(address)]
        if own and name in states and states[name].isup:
            found[name] = own[0]
    source = _source_address(ELSEWHERE if is_loopback(towards) else towards)
    return dict(sorted(found.items(), key=lambda item: (item[1] != source, item[0].startswith(VIRTUAL))))


def reason(error: Exception) -> str:
    """What an error of the system says, without its number."""
    return str(getattr(error, "strerror", None) or error)


def _addresses(interface: str) -> list[str]:
    """Of an interface, IPv4 before IPv6; none where there is no such interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    own = [each for each in psutil.net_if_addrs().get(interface, ()) if each.family in families]
    return [each.address.partition("%")[0] for each in sorted(own, key=lambda each: each.family)]


def _source_address(towards: str) -> str | None:
    """The address from which this machine would send to another; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(family_of(towards), socket.SOCK_DGRAM) as asked:
        asked.connect((towards, 9))
        return str(asked.getsockname()[0])
    return None


def _holder(port: int) -> str:
    """Who listens on a port, where this user may know it."""
    with contextlib.suppress(psutil.Error):
        for found in psutil.net_connections("tcp"):
            if found.pid and found.laddr and found.laddr.port == port and found.status == psutil.CONN_LISTEN:
                return f" by process {found.pid} ({psutil.Process(found.pid).name()})"
    return ""
