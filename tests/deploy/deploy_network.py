"""A network of namespaces on this machine: every container its own, with its own address, joined by a bridge.

Nothing here has a name on the machine. A namespace lives as long as the process that holds it open, and that process
dies with the tests' own, however that ends: so no link, namespace or process can be left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

SUBNET = "10.77.0"
NEEDED = ("ip", "nsenter", "unshare", "setpriv", "mount", "chroot")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
ANSWER_WITHIN_S = 10.0


@cache
def why_no_namespaces() -> str:
    """Why namespaces cannot be had here; empty where they can."""
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        network = Network()
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        return f"network namespaces are not permitted: {said}"
    network.close()
    return ""


@dataclass
class Namespace:
    """A network namespace and the process that holds it open."""

    holder: subprocess.Popen[str]
    address: str = ""
    link: str = ""
    """The end of its cable at the bridge."""

    @property
    def enter(self) -> tuple[str, ...]:
        """What a command line begins with to run in here."""
        return ("nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--")

    @classmethod
    def open(cls) -> Namespace:
        """A new one, with its loopback up."""
        command = [
            *DIES_WITH_US,
            "unshare",
            "--net",
            "--",
            "sh",
            "-c",
            "ip link set lo up && echo up && exec sleep inf",
        ]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "up":
            holder.kill()
            raise subprocess.SubprocessError(holder.communicate(timeout=ANSWER_WITHIN_S)[1])
        return cls(holder)

    def run(self, *command: str) -> None:
        """Runs a short command in here. Raises `CalledProcessError`."""
        subprocess.run([*self.enter, *command], check=True, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)

    def close(self) -> None:
        """Lets it go; it ends with its last process."""
        self.holder.kill()
        self.holder.communicate(timeout=ANSWER_WITHIN_S)


class Network:
    """A bridge in a namespace of its own. Nothing outside can be reached from it, nor it from there."""

    def __init__(self) -> None:
        self._outer = Namespace.open()
        self._members: list[Namespace] = []
        try:
            self._outer.run("ip", "link", "add", "bridge", "type", "bridge")
            self._outer.run("ip", "link", "set", "bridge", "up")
        except BaseException:
            self.close()
            raise

    def join(self) -> Namespace:
        """A new namespace with a cable to the bridge and an address."""
        member = Namespace.open()
        self._members.append(member)
        number = len(self._members) + 1
        member.address, member.link = f"{SUBNET}.{number}", f"port{number}"
        peer = ("peer", "name", "eth0", "netns", str(member.holder.pid))
        self._outer.run("ip", "link", "add", member.link, "type", "veth", *peer)
        self._outer.run("ip", "link", "set", member.link, "master", "bridge", "up")
        member.run("ip", "address", "add", f"{member.address}/24", "dev", "eth0")
        member.run("ip", "link", "set", "eth0", "up")
        return member

    def cut(self, member: Namespace) -> None:
        """Pulls the cable: what is sent either way is lost, and nobody is told."""
        self._outer.run("ip", "link", "set", member.link, "down")

    def mend(self, member: Namespace) -> None:
        """Puts it back."""
        self._outer.run("ip", "link", "set", member.link, "up")

    def close(self) -> None:
        """Lets every namespace go."""
        for namespace in (*self._members, self._outer):
            namespace.close()


def in_namespace(namespace: Namespace, command: Sequence[str]) -> list[str]:
    """A command line that runs `command` in a namespace, and dies with this process."""
    return [*DIES_WITH_US, *namespace.enter, *command]
