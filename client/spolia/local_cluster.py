"""A whole cluster on this machine: every node a process of its own, the way it runs anywhere else."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from spolia import exit_with_parent
from spolia.client import Client
from spolia.local_node import LocalNode, NodeExit, NodeFailed, NodeProcess, cannot_log, ended_how
from spolia_core.errors import Busy, DeadlineExceeded, Forbidden, InvalidRequest, Unauthenticated, Unavailable
from spolia_core.node_name import AUTHORITY_FILE

ROLES = ("kvstore", "prefill", "decode", "gateway")
"""In the order in which nodes start; they stop the other way round, the front door first."""

ENGINE_ROLES = frozenset({"prefill", "decode"})
KEY_ROLES = frozenset({"gateway", "kvstore"})
DRAIN_DELAY_ENV = "SPOLIA_DRAIN_DELAY_S"
_LOOK_S = 0.1
_LOOK_TIMEOUT_S = 2.0


class LocalCluster:
    """One kvstore, some prefill and decode nodes and a gateway, as processes of this machine.

    `settings` are flags for every node, or for one role when they name it: `["--log-level", "debug",
    "--decode.max-batch-rows", "4"]`; `env` is added to every node's environment. Logs go to a file per node under
    `log_dir` (default: a new temporary folder, kept afterwards), or to this process's standard error with `verbose`.
    Engines share the cores evenly unless the environment or `engine_threads` says otherwise. They look for the model's
    calibration profile in `profile_dir`, then beside the model.

    With `tls_dir`, a folder as `spolia certs init` makes it, all connections are under TLS. With `keys`, as
    `spolia keys` writes them, callers show keys; the cluster asks its gateway who is there with `api_key`, an
    operator's.

    `on_exit` is called, on a thread of the cluster, for each node that ends without being asked to; the others go on.
    Nodes end with this process, however it ends.

    Methods are for one thread at a time. A port that is 0 is chosen by the system; an `http_port` of -1 serves no HTTP.

    >>> with LocalCluster("models/demo", num_decode=2) as cluster, Client(cluster.address) as client:
    ...     print(client.generate("Once upon a time").text)
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        port: int = 0,
        http_port: int = 0,
        settings: Sequence[str] = (),
        log_dir: Path | None = None,
        verbose: bool = False,
        env: Mapping[str, str] | None = None,
        engine_threads: int | None = None,
        profile_dir: Path | None = None,
        tls_dir: Path | None = None,
        keys: str = "",
        api_key: str | None = None,
        start_timeout_s: float = 120.0,
        stop_timeout_s: float = 15.0,
        on_exit: Callable[[NodeExit], None] | None = None,
    ) -> None:
        self._model = model
        self._counts = {"kvstore": 1, "prefill": num_prefill, "decode": num_decode, "gateway": 1}
        self._port = port
        self._http_port = http_port
        self._settings = _checked_settings(settings)
        self._log_dir = log_dir
        self._verbose = verbose
        self._env = _whole_cluster_env() | dict(env or {})
        self._profile_dir = profile_dir
        self._tls_dir = tls_dir
        self._keys = keys
        self._api_key = api_key
        self._engine_env = _engine_env(engine_threads, num_prefill + num_decode) | self._env
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._on_exit = on_exit
        self._processes: list[NodeProcess] = []
        self._expected_to_end: set[int] = set()
        self._changed = threading.Condition()

    @property
    def address(self) -> str:
        """Where clients connect. Call after `start`."""
        return self._only("gateway").node.address

    @property
    def http_address(self) -> str:
        """Where OpenAI's clients connect, "host:port"; empty without HTTP. Call after `start`."""
        return self._only("gateway").node.http_address

    @property
    def url(self) -> str:
        """The page, and what OpenAI's base URL begins with; empty without HTTP. Call after `start`."""
        scheme = "http" if self._tls_dir is None else "https"
        return f"{scheme}://{self.http_address}" if self.http_address else ""

    @property
    def ca_file(self) -> Path | None:
        """The authority that clients must know; None without TLS."""
        return None if self._tls_dir is None else self._tls_dir / AUTHORITY_FILE

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers show keys."""
        return bool(self._keys)

    @property
    def directory_address(self) -> str:
        """Where the kvstore and its directory are. Call after `start`."""
        return self._only("kvstore").node.address

    @property
    def nodes(self) -> tuple[LocalNode, ...]:
        """The nodes that run now, in the order in which they were started."""
        return tuple(process.node for process in self._processes if process.running)

    @property
    def log_dir(self) -> Path | None:
        """Where the logs are; None where they go to the terminal."""
        return self._log_dir

    def start(self) -> None:
        """Starts every node and waits until the gateway knows them all.

        Raises `NodeFailed` with the end of its log when one ends early or is late, `NodeRefused` when that was for what
        it was told, `InvalidRequest` when `log_dir` cannot be written; nothing is left running then.
        """
        deadline_s = time.monotonic() + self._start_timeout_s
        try:
            self._make_log_dir()
            store = self._spawn("kvstore")
            self._wait_until_ready([store], deadline_s)
            others = [self._spawn(role) for role in ROLES[1:] for _ in range(self._counts[role])]
            self._wait_until_ready(others, deadline_s)
            self._wait_until_known([store, *others], deadline_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> tuple[LocalNode, ...]:
        """Ends every node: gateway, decode, prefill, kvstore. Returns those that had to be killed for being late.

        May be called twice, and after a `start` that failed.
        """
        self._expected_to_end.update(process.pid for process in self._processes)
        late: list[NodeProcess] = []
        try:
            for role in reversed(ROLES):
                late += self._stop_role(role)
        finally:
            for process in self._processes:
                if process.running:
                    process.kill()
        return tuple(process.node for process in late)

    def add_node(self, role: str) -> LocalNode:
        """Starts one more node of `role`, "prefill" or "decode", and waits until the gateway knows it."""
        return self._ready(self._spawn(role))

    def kill(self, node: LocalNode) -> None:
        """Ends a node at once, as a crash would (SIGKILL); returns when it is gone. `on_exit` is not called."""
        self._expected_to_end.add(node.pid)
        self._process(node).kill()

    def restart(self, node: LocalNode) -> LocalNode:
        """Starts a node again that has ended, under its name and at its address, and waits until it is known."""
        if self._process(node).running:
            raise ValueError(f"{node.name} is running")
        self._processes = [process for process in self._processes if process.pid != node.pid]
        http_port = _port_of(node.http_address) if node.http_address else 0
        return self._ready(self._spawn(node.role, name=node.name, port=_port_of(node.address), http_port=http_port))

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, role: str, name: str = "", port: int = 0, http_port: int = 0) -> NodeProcess:
        name = name or self._free_name(role)
        arguments = self._arguments(role, port or (self._port if role == "gateway" else 0))
        if role == "gateway":
            arguments[:0] = ["--http-port", str(http_port or self._http_port)]
        process = NodeProcess(
            name,
            role,
            [sys.executable, "-P", exit_with_parent.__file__, f"spolia_{role}", *arguments],
            env=self._engine_env if role in ENGINE_ROLES else self._env,
            log_path=None if self._log_dir is None else self._log_dir / f"{name}.log",
            changed=self._changed,
            on_exit=self._note_exit,
        )
        self._processes.append(process)
        return process

    def _arguments(self, role: str, port: int) -> list[str]:
        arguments = ["--port", str(port)]
        if self._tls_dir is not None:
            arguments += ["--tls-dir", str(self._tls_dir)]
        if self._keys and role in KEY_ROLES:
            arguments += ["--keys", self._keys]
        if role != "kvstore":
            arguments += ["--directory", self.directory_address]
            if self._model is not None:
                arguments += ["--model", str(self._model)]
        if role in ENGINE_ROLES and self._profile_dir is not None:
            arguments += ["--profile-dir", str(self._profile_dir)]
        return arguments + settings_for(role, self._settings)

    def _ready(self, process: NodeProcess) -> LocalNode:
        deadline_s = time.monotonic() + self._start_timeout_s
        self._wait_until_ready([process], deadline_s)
        self._wait_until_known([process], deadline_s)
        return process.node

    def _wait_until_ready(self, processes: Sequence[NodeProcess], deadline_s: float) -> None:
        def settled() -> bool:
            return not all(process.running for process in processes) or all(process.ready for process in processes)

        with self._changed:
            in_time = self._changed.wait_for(settled, deadline_s - time.monotonic())
        _check_running(processes)
        if not in_time:
            late = next(process for process in processes if not process.ready)
            raise late.failure(f"was not ready within {self._start_timeout_s:g} s")

    def _wait_until_known(self, processes: Sequence[NodeProcess], deadline_s: float) -> None:
        """The gateway offers no stream of its members, so this looks every `_LOOK_S`."""
        wanted = {process.node.address: process.name for process in processes}
        with Client(
            self.address, timeout_s=_LOOK_TIMEOUT_S, retry_s=0, api_key=self._api_key, ca_file=self.ca_file
        ) as client:
            while missing := wanted.keys() - _known_addresses(client):
                _check_running(processes)
                if time.monotonic() >= deadline_s:
                    names = ", ".join(sorted(wanted[address] for address in missing))
                    raise NodeFailed(f"the gateway does not know {names} after {self._start_timeout_s:g} s")
                with self._changed:
                    self._changed.wait(_LOOK_S)

    def _stop_role(self, role: str) -> list[NodeProcess]:
        running = [process for process in self._processes if process.role == role and process.running]
        for process in running:
            process.terminate()
        deadline_s = time.monotonic() + self._stop_timeout_s
        late = [process for process in running if not process.wait_ended(deadline_s)]
        for process in late:
            process.kill()
        return late

    def _note_exit(self, process: NodeProcess) -> None:
        if process.pid not in self._expected_to_end and self._on_exit is not None:
            self._on_exit(process.exit)

    def _make_log_dir(self) -> None:
        if self._verbose:
            return
        try:
            if self._log_dir is None:
                self._log_dir = Path(tempfile.mkdtemp(prefix="spolia-"))
            self._log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_log(self._log_dir or Path(tempfile.gettempdir()), error) from error

    def _free_name(self, role: str) -> str:
        taken = {process.name for process in self._processes}
        return next(name for number in range(len(taken) + 1) if (name := f"{role}-{number}") not in taken)

    def _only(self, role: str) -> NodeProcess:
        for process in self._processes:
            if process.role == role:
                return process
        raise Unavailable(f"the cluster has no {role}: it has not been started")

    def _process(self, node: LocalNode) -> NodeProcess:
        for process in self._processes:
            if process.pid == node.pid:
                return process
        raise ValueError(f"{node.name} (pid {node.pid}) is no node of this cluster")


def settings_for(role: str, settings: Sequence[str]) -> list[str]:
    """The flags of `settings` that concern `role`, without the role's name before them.

    >>> settings_for("decode", ["--log-level", "debug", "--decode.pool-bytes", "9", "--prefill.pool-bytes=5"])
    ['--log-level', 'debug', '--pool-bytes', '9']
    """
    chosen: list[str] = []
    concerns = True
    for word in settings:
        if word.startswith("--"):
            named = _role_named_in(word)
            concerns = named in ("", role)
            word = f"--{word.removeprefix(f'--{named}.')}" if named else word
        if concerns:
            chosen.append(word)
    return chosen


def _checked_settings(settings: Sequence[str]) -> Sequence[str]:
    for word in settings:
        named = _role_named_in(word)
        if named and named not in ROLES:
            roles = ", ".join(ROLES)
            raise InvalidRequest(f'there is no role "{named}", in {word}', field="settings", limit=roles, actual=named)
    return settings


def _role_named_in(word: str) -> str:
    """What stands before the dot of a flag; empty for a flag of every role, and for a value."""
    flag = word.partition("=")[0]
    return flag[2:].partition(".")[0] if flag.startswith("--") and "." in flag else ""


def _check_running(processes: Sequence[NodeProcess]) -> None:
    for process in processes:
        if not process.running:
            raise process.failure(
                f"{ended_how(process.exit.exit_code)} before it was {'known' if process.ready else 'ready'}"
            )


def _known_addresses(client: Client) -> set[str]:
    try:
        return {node.address for node in client.cluster().nodes}
    except (Busy, DeadlineExceeded, Unavailable):
        return set()
    except (Forbidden, Unauthenticated) as error:
        raise type(error)(
            "a local cluster asks its own gateway who is there, and needs an operator's key for it: SPOLIA_API_KEY, or "
            f"api_key; spolia keys create --operator makes one. It was told: {error.message}",
            field=error.field,
            limit=error.limit,
        ) from error


def _whole_cluster_env() -> dict[str, str]:
    """Nodes of a cluster that ends as a whole have nobody to give time to hear of it."""
    return {} if DRAIN_DELAY_ENV in os.environ else {DRAIN_DELAY_ENV: "0"}


def _engine_env(engine_threads: int | None, num_engines: int) -> dict[str, str]:
    """Torch takes every core for itself unless it is told; engines that share a machine would fight for them.

    Threads that wait spin by default: beside another busy process that made a product of two threads 2 × slower.
    """
    env = {} if "OMP_WAIT_POLICY" in os.environ else {"OMP_WAIT_POLICY": "passive"}
    if engine_threads is None and "OMP_NUM_THREADS" in os.environ:
        return env
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return env | {"OMP_NUM_THREADS": str(engine_threads or max(1, cores // max(1, num_engines)))}


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
