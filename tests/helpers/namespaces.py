"""Two machines simulated on one: network namespaces with an address each and a cable (veth) between them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.213.7.1", "10.213.7.2")
CARD = "cable"
"""Name of the network card in both machines."""


@dataclass(frozen=True, slots=True)
class TwoMachines:
    """Two connected namespaces."""

    names: tuple[str, str]

    def on(self, machine: int, command: list[str]) -> list[str]:
        """The command that runs ``command`` on that machine."""
        return ["ip", "netns", "exec", self.names[machine], *command]

    def environment(self) -> dict[str, str]:
        """Variables that gloo needs."""
        return {"GLOO_SOCKET_IFNAME": CARD}

    def take_down(self, machine: int) -> None:
        """Pull the cable: packets are lost silently."""
        _ip("-n", self.names[machine], "link", "set", CARD, "down")

    def bring_up(self, machine: int) -> None:
        """Put the cable back."""
        _ip("-n", self.names[machine], "link", "set", CARD, "up")


@contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """Make both machines, and remove them in the end.

    Raises:
        PermissionError: namespaces may not be made here, or ``ip`` is missing; the message tells which.
    """
    names = (f"align-{os.getpid()}-a", f"align-{os.getpid()}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", CARD, "netns", names[0], "type", "veth", "peer", "name", CARD, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
            for card in ("lo", CARD):
                _ip("-n", name, "link", "set", card, "up")
        yield TwoMachines(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise PermissionError("no `ip` (iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise PermissionError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from None
