"""The compose file's topology, run without an engine: every service and replica, in the order of its dependencies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy_compose import Mount, Service, read_compose
from deploy_container import REPOSITORY, Container
from deploy_image import Image, read_images
from deploy_network import Network

from spolia_bench.redis_server import redis_binary

DOCKER = REPOSITORY / "docker"
OWNER = 10001
"""Who owns what a volume holds, as in the images."""

CLIENT = "client"
LOOK_S = 0.1
START_WITHIN_S = 500.0


class Topology:
    """A compose project. `up` starts it; leaving the block ends all of it, whatever happened."""

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str],
        scale: Mapping[str, int] | None = None,
        compose_file: Path = DOCKER / "compose.yaml",
    ) -> None:
        """`folder` is for volumes and logs; `environ` for what the file asks of its user; `scale` as `--scale` says."""
        self.services = read_compose(compose_file, environ)
        self.containers: dict[str, Container] = {}
        self._folder = folder
        self._scale = dict(scale or {})
        self._images = read_images(DOCKER / "Dockerfile", REPOSITORY)
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        self._network = Network()

    def __enter__(self) -> Topology:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Starts what does not run yet, each service once what it depends on is as far as it asks for, and waits until
        all are healthy.

        Raises `AssertionError` with the ends of the logs when one ends badly, or is late.
        """
        deadline = time.monotonic() + START_WITHIN_S
        waiting = self._missing()
        while waiting:
            ready = [each for each in waiting if self._may_start(each.service)]
            for each in ready:
                each.start()
                waiting.remove(each)
            if not ready:
                self._pause(deadline, f"{waiting[0].name} waits for {waiting[0].service.depends_on}")
                self._check_running()
        self.wait_healthy(deadline=deadline)

    def wait_healthy(self, *containers: Container, deadline: float | None = None) -> None:
        """Returns when these, or all, are healthy; those that run to an end have ended well."""
        until = time.monotonic() + START_WITHIN_S if deadline is None else deadline
        waiting = list(containers or self.containers.values())
        while waiting := [each for each in waiting if not self._is_well(each)]:
            self._pause(until, f"{waiting[0].name} is not healthy")
            self._check_running(*waiting)

    def of(self, service: str) -> list[Container]:
        """The replicas of a service."""
        return [each for each in self.containers.values() if each.service.name == service]

    def restart(self, container: Container) -> None:
        """Ends a container in order and starts it again; returns when it is healthy."""
        container.stop()
        container.start()
        self.wait_healthy(container)

    def scale(self, service: str, replicas: int) -> list[Container]:
        """More replicas of a service; those that are new, healthy."""
        self._scale[service] = replicas
        before = set(self.containers)
        self.up()
        return [each for name, each in self.containers.items() if name not in before]

    def cut(self, container: Container) -> None:
        """Pulls a container's network cable."""
        self._network.cut(container.namespace)

    def mend(self, container: Container) -> None:
        """Puts it back."""
        self._network.mend(container.namespace)

    def client(self) -> Container:
        """A container for commands of a user's: in the network, with the gateway's image, and nothing running."""
        image = self._images["gateway"]
        service = Service(CLIENT, "gateway", "", None, None, {}, None, self._every_volume())
        return self._add(service, Image(env={}, user="0:0", files=image.files), 1)

    def down(self) -> None:
        """Kills every process and lets the network go."""
        for container in self.containers.values():
            container.kill()
        self._network.close()

    def volume(self, name: str) -> Path:
        """Where a volume's files are on this machine."""
        folder = self._folder / "volumes" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chown(folder, OWNER, OWNER)
        return folder

    def _missing(self) -> list[Container]:
        """Containers that are to be there, made where they are not; those that have never run."""
        for service in self.services.values():
            for number in range(1, self._scale.get(service.name, service.replicas) + 1):
                if f"{service.name}-{number}" not in self.containers:
                    self._add(service, self._image_of(service), number)
        self._write_hosts()
        return [each for each in self.containers.values() if not each.was_started and each.service.name != CLIENT]

    def _add(self, service: Service, image: Image, number: int) -> Container:
        name = f"{service.name}-{number}"
        redis = redis_binary()
        programs = [] if redis is None else [Path(redis), Path(redis).with_name("redis-cli")]
        made = Container(
            name, service, image, self._network.join(), self._folder, self._hosts, self._place_of, programs
        )
        self.containers[name] = made
        self._write_hosts()
        return made

    def _image_of(self, service: Service) -> Image:
        return self._images[service.target] if service.target else Image(user=f"{OWNER}:{OWNER}")

    def _every_volume(self) -> tuple[Mount, ...]:
        """All named volumes, where a user finds them: /volumes/NAME."""
        named = {m.source for each in self.services.values() for m in each.mounts if not m.source.startswith("/")}
        return tuple(Mount(source, f"/volumes/{source}", read_only=True) for source in sorted(named))

    def _write_hosts(self) -> None:
        """Names as the engine's DNS has them: a service's lead to all its replicas. In place, for it is mounted."""
        lines = ["127.0.0.1 localhost"]
        lines += [f"{each.address} {each.service.name} {name}" for name, each in self.containers.items()]
        self._hosts.write_text("\n".join(lines) + "\n")

    def _place_of(self, mount: Mount) -> Path:
        return Path(mount.source) if mount.source.startswith("/") else self.volume(mount.source)

    def _may_start(self, service: Service) -> bool:
        holds: dict[str, Callable[[Container], bool]] = {
            "service_started": lambda each: each.running,
            "service_healthy": Container.is_healthy,
            "service_completed_successfully": lambda each: each.exit_code == 0,
        }
        return all(holds[condition](each) for name, condition in service.depends_on.items() for each in self.of(name))

    def _is_well(self, container: Container) -> bool:
        """Whether it is healthy, has run to its end, or never had anything to run."""
        if self._runs_to_an_end(container.service):
            return container.exit_code == 0
        return container.service.name == CLIENT or container.is_healthy()

    def _runs_to_an_end(self, service: Service) -> bool:
        conditions = {each.depends_on.get(service.name) for each in self.services.values()}
        return "service_completed_successfully" in conditions

    def _pause(self, deadline: float, what: str) -> None:
        assert time.monotonic() < deadline, self._failure(what)
        time.sleep(LOOK_S)

    def _check_running(self, *containers: Container) -> None:
        for container in containers or self.containers.values():
            assert not container.exit_code, self._failure(f"{container.name} ended with {container.exit_code}")

    def _failure(self, what: str) -> str:
        tails = [f"--- {name}\n{each.log_tail()}" for name, each in self.containers.items() if each.log_tail()]
        return "\n".join([what, *tails])
