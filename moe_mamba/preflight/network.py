"""The interfaces of a machine, and whether others reach an address: found out by connecting."""

import os
import secrets
import socket
import threading
import time

import psutil

from moe_mamba.parallel.network import ELSEWHERE, family_of, usable_interfaces
from moe_mamba.preflight.report import Interface

SECONDS_TO_CONNECT = 5.0
SECONDS_TO_REST = 0.05
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


def asked_interfaces() -> dict[str, str]:
    """What the environment says of interfaces."""
    return {name: os.environ[name] for name in ASKED if os.environ.get(name)}


def route_interface() -> str | None:
    """The interface over which this machine reaches rank 0's, or would be reached: what to give to gloo and NCCL."""
    return next(iter(usable_interfaces(os.environ.get("MASTER_ADDR", ELSEWHERE))), None)


class Listener:
    """An open port at an address, whose token tells that who answers there is this process."""

    def __init__(self, address: str) -> None:
        """Listen; raises OSError where the address is not this machine's."""
        self.token = secrets.token_hex(8)
        self._server = socket.create_server((address, 0), family=family_of(address))
        self.port: int = self._server.getsockname()[1]
        self._is_closed = False
        threading.Thread(target=self._answer, name="preflight", daemon=True).start()

    def _answer(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._server.accept()
                with connection:
                    connection.sendall(self.token.encode())
            except OSError:  # closed; gone again; or no descriptor is left for now
                time.sleep(SECONDS_TO_REST)

    def close(self) -> None:
        """Close the port, and with it the thread that waits at it."""
        self._is_closed = True
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
