"""A container without an engine: a process in a network namespace of its own, seeing the files its image would have.

Its root is put together from this machine's system folders and this checkout, read-only, with the service's volumes
mounted where the compose file says. It runs as the image's user, with the image's and the service's environment and
nothing else of this process's.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy_compose import Mount, Service
from deploy_image import Image
from deploy_network import DIES_WITH_US, Namespace

REPOSITORY = Path(__file__).parents[2]
SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "dev", "proc")
PROBE_WITHIN_S = 10.0
PATH = f"{Path(sys.executable).parent}:/container/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


class Container:
    """One replica of a service. `start` it, `stop` it as an engine does, or `kill` it; it keeps its address."""

    def __init__(
        self,
        name: str,
        service: Service,
        image: Image,
        namespace: Namespace,
        folder: Path,
        hosts: Path,
        volume: Callable[[Mount], Path],
        programs: Sequence[Path] = (),
    ) -> None:
        """`folder` is its own, for its root and its log. `volume` says where a mount's files are; `programs` are put on
        its PATH.
        """
        self.name = name
        self.service = service
        self.namespace = namespace
        self.log = folder / f"{name}.log"
        self._image = image
        self._environment = image.env | service.env
        self._script = folder / f"{name}.sh"
        self._root = folder / f"{name}.root"
        self._root.mkdir()
        mounts = [(volume(mount), mount) for mount in service.mounts]
        mounts += [(source, Mount("", target, read_only=True)) for target, source in image.files.items()]
        mounts += [(hosts, Mount("", "/etc/hosts", read_only=True))]
        if not Path(
            "/etc/resolv.conf"
        ).is_symlink():  # a name that is not in there does not exist, and is not asked for
            mounts += [(Path("/dev/null"), Mount("", "/etc/resolv.conf", read_only=True))]
        mounts += [(path, Mount("", f"/container/bin/{path.name}", read_only=True)) for path in programs]
        self._script.write_text(_script(self._root, mounts, service))
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def address(self) -> str:
        """Its IP address."""
        return self.namespace.address

    @property
    def was_started(self) -> bool:
        """Whether `start` was ever called."""
        return self._process is not None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Starts it, and returns at once."""
        entrypoint = self._image.entrypoint if self.service.entrypoint is None else self.service.entrypoint
        command = self._image.command if self.service.command is None else self.service.command
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._inside((*entrypoint, *command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self) -> float:
        """Ends it as an engine does: SIGTERM, and SIGKILL after the grace period; how long it took.

        Raises `AssertionError` when it had to be killed.
        """
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        self.wait()
        return time.monotonic() - began

    def wait(self) -> int:
        """Its exit code, once it has ended. Raises `AssertionError` when it had to be killed after its grace period."""
        assert self._process is not None, f"{self.name} was never started"
        try:
            return self._process.wait(self.service.stop_grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end within {self.service.stop_grace_s} s") from None

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def signal(self, number: int) -> None:
        """Sends a signal."""
        assert self._process is not None, f"{self.name} was never started"
        self._process.send_signal(number)

    def is_healthy(self) -> bool:
        """What its health check says; True without one while it runs."""
        test = self._image.healthcheck if self.service.healthcheck is None else self.service.healthcheck
        if not test:
            return self.running
        return self.running and self._may_be_healthy() and self.run(*test).returncode == 0

    def _may_be_healthy(self) -> bool:
        """A node says READY before it is; probing one that starts would take the time that it needs."""
        if not self.service.target:
            return True
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return b"READY " in log.read()

    def run(self, *command: str, timeout_s: float = PROBE_WITHIN_S) -> subprocess.CompletedProcess[str]:
        """Runs a command in it, as `docker exec` does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(self._inside(command), capture_output=True, text=True, timeout=timeout_s)
        return subprocess.CompletedProcess(command, 124, "", f"not within {timeout_s} s")

    def command_line(self, *command: str) -> list[str]:
        """What runs `command` in it, for those who hold on to the process."""
        return self._inside(command)

    def log_tail(self, num_lines: int = 25) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:]) if self.log.exists() else ""

    def _inside(self, command: Sequence[str]) -> list[str]:
        user, _, group = (self._image.user if self.service.user is None else self.service.user).partition(":")
        who = [f"--reuid={user}", f"--regid={group or user}", "--clear-groups", "--no-new-privs"]
        environment = {"PATH": PATH, "HOME": "/tmp"} | self._environment | {"PATH": PATH}
        return [
            *self._into_root(),
            *("setpriv", "--pdeathsig", "KILL", *who, "--"),  # again: a change of the user takes the wish away
            *("env", "-i", "-C", "/tmp", *(f"{key}={value}" for key, value in environment.items())),
            *command,
        ]

    def _into_root(self) -> list[str]:
        return [*DIES_WITH_US, *self.namespace.enter, "unshare", "--mount", "--", "sh", str(self._script)]


def _script(root: Path, mounts: Sequence[tuple[Path, Mount]], service: Service) -> str:
    """Puts a root together in a mount namespace of its own, and becomes what its arguments say, inside."""
    lines = ["set -e", f"mount -t tmpfs -o mode=755 root {root}"]
    for name in SYSTEM:
        here = Path("/", name)
        if here.is_symlink():
            lines.append(f"ln -s {os.readlink(here)} {root}/{name}")
        elif here.is_dir():
            lines.append(f"mkdir {root}/{name} && mount --rbind {here} {root}/{name}")
    lines.append(f"mkdir {root}/tmp && mount -t tmpfs -o mode=1777 tmp {root}/tmp")
    lines += [_bound(root, path, str(path), read_only=True) for path in _code()]
    lines += [_bound(root, source, mount.target, read_only=mount.read_only) for source, mount in mounts]
    if service.read_only:
        lines.append(f"mount -o remount,bind,ro {root} {root}")
    lines.append(f'exec chroot {root} "$@"')
    return "\n".join(lines) + "\n"


def _code() -> list[Path]:
    """What the processes load: Python, what is installed, and this checkout's packages."""
    roots = [Path(sys.base_prefix), Path(sys.prefix), REPOSITORY]
    return [path for path in dict.fromkeys(roots) if not path.is_relative_to("/usr")]


def _bound(root: Path, source: Path, target: str, *, read_only: bool) -> str:
    place = shlex.quote(f"{root}{target}")
    here = shlex.quote(str(source))
    make = f"mkdir -p {place}" if source.is_dir() else f"mkdir -p $(dirname {place}) && : >> {place}"
    bind = f"mount --bind {here} {place}" + (f" && mount -o remount,bind,ro {place}" if read_only else "")
    return f"{{ [ -e {place} ] || {{ {make}; }}; }} && {bind}"
