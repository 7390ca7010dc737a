"""Host names, interfaces, and whether others reach an address: found out by connecting."""

import ipaddress
import os
import secrets
import socket
import threading

import psutil

from moe_mamba.preflight.report import Interface

SECONDS_TO_CONNECT = 5.0
# Of bridges and tunnels on one machine: others of that name elsewhere have the same addresses.
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "podman", "tun")
ASKED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interfaces() -> list[Interface]:
    """Addresses of the interfaces that are up, IPv4 before IPv6."""
    states = psutil.net_if_stats()
    found = [
        (address.family, Interface(name=name, address=address.address.partition("%")[0]))
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and name in states and states[name].isup
    ]
    return [interface for _, interface in sorted(found, key=lambda pair: pair[0])]


def host_addresses() -> list[str]:
    """What this machine's host name resolves to here, in the order in which gloo tries it."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def is_loopback(address: str) -> bool:
    """Whether nobody but the same machine reaches it."""
    return ipaddress.ip_address(address).is_loopback


def asked_interfaces() -> dict[str, str]:
    """What the environment says of interfaces."""
    return {name: os.environ[name] for name in ASKED if os.environ.get(name)}


def gloo_address(addresses: list[str], known: list[Interface], asked: dict[str, str]) -> str | None:
    """Where gloo will listen: at the interface that it is told, or at the first address of the host name that is ours.

    None: there is no such interface, or the name leads elsewhere, so that it takes the loopback. Gloo makes groups on
    GPUs as well: checkpoints use one.
    """
    if "GLOO_SOCKET_IFNAME" in asked:
        name = asked["GLOO_SOCKET_IFNAME"].partition(",")[0]
        return next((interface.address for interface in known if interface.name == name), None)
    return next((address for address in addresses if _can_listen(address)), None)


def route_interface(known: list[Interface]) -> str | None:
    """The interface over which this machine reaches rank 0's, or would be reached: what to give to gloo and NCCL."""
    usable = [one for one in known if not is_loopback(one.address) and not one.name.startswith(VIRTUAL)]
    try:
        own = _address_towards(os.environ["MASTER_ADDR"])
    except (OSError, KeyError):
        own = ""
    return next((one.name for one in [*(one for one in usable if one.address == own), *usable]), None)


class Listener:
    """An open port at an address, whose token tells that who answers there is this process."""

    def __init__(self, address: str) -> None:
        """Listen; raises OSError where the address is not this machine's."""
        self.token = secrets.token_hex(8)
        self._server = socket.create_server((address, 0), family=_family(address))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._answer, name="preflight", daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            with connection:
                connection.sendall(self.token.encode())

    def close(self) -> None:
        """Close the port, and with it the thread that waits at it."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


def connect(address: str, port: int, token: str) -> str | None:
    """Whether the process that listens there with this token is reached: None, or why not."""
    try:
        with socket.create_connection((address, port), timeout=SECONDS_TO_CONNECT) as connection:
            answer = connection.recv(len(token), socket.MSG_WAITALL).decode(errors="replace")
    except OSError as error:
        return error.strerror or str(error) or "no answer"
    return None if answer == token else "another process answers at this address"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _can_listen(address: str) -> bool:
    try:
        with socket.socket(_family(address)) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _address_towards(host: str) -> str:
    """The own address from which packets to `host` go; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
