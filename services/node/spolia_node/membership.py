"""A node's place in the directory, and its view of the others.

Both sides keep a stream to the directory and open it again, 0.1 … 2 s apart, for as long as they run: a directory that
is away stops nobody. The view then goes on with what it knew. Where the directory has several addresses ("a:1,b:2"),
the next is tried when the present one fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator
from functools import partial

import grpc

from spolia.v1.directory_pb2 import NodeRecord, NodeRole, RegisterRequest, RegisterResponse, WatchRequest
from spolia.v1.directory_pb2_grpc import DirectoryServiceStub
from spolia_core.errors import SpoliaError, Unavailable
from spolia_node.calls import call_errors
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.directory_turns import DirectoryTurns
from spolia_node.logs import get_log

ANSWER_TIMEOUT_S = 5.0
MIN_HEARTBEAT_INTERVAL_S = 0.05
"""However often a node is touched: a record with thousands of chunk ids is not free."""

MAX_HEARTBEAT_INTERVAL_S = 1.0
"""Or a third of the lease, if that is shorter: a node's load is no older."""

HIDE_DEAD_S = 3.0
REJOIN_GRACE_S = 5.0
"""How long nodes that a directory does not list stay in the view after the stream to it was opened anew: one that has
just started has not heard from them yet."""

log = get_log(__name__)


class Registration:
    """Keeps a node registered. `make_record` is asked for the record at every heartbeat."""

    def __init__(self, channels: ChannelPool, directory_address: str, make_record: Callable[[], NodeRecord]) -> None:
        self._channels = channels
        self._turns = DirectoryTurns(directory_address)
        self._make_record = make_record
        self._wake = asyncio.Event()
        self._registered = asyncio.Event()
        self._num_touches = 0
        self._num_told = 0
        self._told = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def registered(self) -> bool:
        """Whether the directory answered the last heartbeat."""
        return self._registered.is_set()

    async def wait_registered(self, deadline: Deadline) -> None:
        """Returns once registered. Raises `DeadlineExceeded`."""
        await deadline.wait(self._registered.wait(), "registration with the directory")

    def start(self) -> None:
        """Begins to register. Needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="registration")

    async def stop(self) -> None:
        """Leaves the directory: the stream ends, and with it the membership. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._tell(self._num_touches)

    def touch(self) -> Awaitable[None]:
        """Sends the record as it is now. The result may be ignored, or awaited until the directory has it."""
        self._num_touches += 1
        self._wake.set()
        return _Told(partial(self._wait_told, self._num_touches))

    async def _run(self) -> None:
        while True:
            address = self._turns.address
            try:
                await self._stay_registered(address)
            except Exception as error:
                _log_failure("registration failed", address, error)
            finally:
                self._registered.clear()
            await asyncio.sleep(self._turns.failed())

    async def _stay_registered(self, address: str) -> None:
        with call_errors(address):
            call = DirectoryServiceStub(self._channels.get(address, "kvstore")).Register(None)
            call.add_done_callback(lambda _: self._wake.set())  # a broken stream is noticed at once
            try:
                while True:
                    lease_s = await self._heartbeat(call)
                    self._turns.answered()
                    self._registered.set()
                    await asyncio.sleep(MIN_HEARTBEAT_INTERVAL_S)
                    await self._touched_within(min(MAX_HEARTBEAT_INTERVAL_S, lease_s / 3))
            finally:
                call.cancel()

    async def _heartbeat(self, call: grpc.aio.StreamStreamCall[RegisterRequest, RegisterResponse]) -> float:
        """Sends the record and returns the lease in seconds."""
        self._wake.clear()
        num_touches = self._num_touches
        response = await Deadline.after(ANSWER_TIMEOUT_S).wait(self._exchange(call), "a heartbeat")
        self._tell(num_touches)
        return response.lease_ms / 1000

    async def _exchange(self, call: grpc.aio.StreamStreamCall[RegisterRequest, RegisterResponse]) -> RegisterResponse:
        await call.write(RegisterRequest(record=self._make_record()))
        response = await call.read()
        if not isinstance(response, RegisterResponse):
            raise Unavailable("the directory ended the stream")
        return response

    async def _touched_within(self, seconds: float) -> None:
        # Not `wait_for`: before Python 3.12 it loses a cancel that comes together with the wake.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _tell(self, num_touches: int) -> None:
        self._num_told = num_touches
        self._told.set()
        self._told = asyncio.Event()

    async def _wait_told(self, touch_number: int) -> None:
        while self._num_told < touch_number and self._task is not None:
            await self._told.wait()


class _Told:
    """Waits for the answer to a touch, but only when awaited: `touch` is called often and awaited rarely."""

    def __init__(self, wait: Callable[[], Coroutine[None, None, None]]) -> None:
        self._wait = wait

    def __await__(self) -> Generator[None, None, None]:
        return self._wait().__await__()


class ClusterView:
    """The nodes of some roles, as the directory last said. Records belong to the view: do not change them."""

    def __init__(self, channels: ChannelPool, directory_address: str, roles: Collection[NodeRole.ValueType]) -> None:
        self._channels = channels
        self._turns = DirectoryTurns(directory_address)
        self._roles = tuple(roles)
        self._nodes: dict[str, NodeRecord] = {}
        self._rejoining: dict[str, NodeRecord] = {}
        self._rejoin_until = 0.0
        self._dead_until: dict[str, float] = {}
        self._reachable = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def reachable(self) -> bool:
        """Whether the directory is answering now; when not, `nodes` are those last known."""
        return self._reachable

    def start(self) -> None:
        """Begins to watch. Needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="cluster-view")

    async def stop(self) -> None:
        """Ends the watch; the nodes last known stay. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._set_reachable(False)

    def nodes(
        self, role: NodeRole.ValueType, *, include_draining: bool = False, include_dead: bool = False
    ) -> list[NodeRecord]:
        """Nodes of `role` by node id; draining ones, and those marked dead, only when asked for."""
        now = time.monotonic()
        return [
            record
            for node_id, record in sorted(self._known(now).items())
            if record.role == role
            and (include_draining or not record.draining)
            and (include_dead or self._dead_until.get(node_id, 0.0) <= now)
        ]

    def mark_dead(self, node_id: str) -> None:
        """Hides a node that did not answer, until the directory has seen it leave and register again, or for 3 s."""
        self._dead_until[node_id] = time.monotonic() + HIDE_DEAD_S
        self._rejoining.pop(node_id, None)
        self._notify_later(HIDE_DEAD_S)

    async def wait_for(self, predicate: Callable[[ClusterView], bool], deadline: Deadline) -> None:
        """Returns once `predicate` holds; asked again at every change. Raises `DeadlineExceeded`."""
        while True:
            changed = self._changed
            if predicate(self):
                return
            await deadline.wait(changed.wait(), "waiting for the cluster")

    async def _run(self) -> None:
        while True:
            address = self._turns.address
            try:
                await self._watch(address)
            except Exception as error:
                _log_failure("directory away", address, error)
            finally:
                self._set_reachable(False)
            await asyncio.sleep(self._turns.failed())

    async def _watch(self, address: str) -> None:
        with call_errors(address):
            call = DirectoryServiceStub(self._channels.get(address, "kvstore")).Watch(WatchRequest(roles=self._roles))
            try:
                async for snapshot in call:
                    self._turns.answered()
                    self._take({record.node_id: record for record in snapshot.nodes})
            finally:
                call.cancel()
        raise Unavailable("the directory ended the stream")

    def _known(self, now: float) -> dict[str, NodeRecord]:
        return (self._rejoining if now < self._rejoin_until else {}) | self._nodes

    def _take(self, nodes: dict[str, NodeRecord]) -> None:
        now = time.monotonic()
        if not self._reachable:
            self._rejoining = self._known(now)
            self._rejoin_until = now + REJOIN_GRACE_S
            self._notify_later(REJOIN_GRACE_S)
        for node_id in nodes.keys() - self._nodes.keys():
            self._channels.look_again(nodes[node_id].address)
        self._rejoining = {node_id: record for node_id, record in self._rejoining.items() if node_id not in nodes}
        self._nodes = nodes
        self._dead_until = {
            node_id: until for node_id, until in self._dead_until.items() if node_id in nodes and until > now
        }
        self._set_reachable(True)
        self._notify()

    def _set_reachable(self, reachable: bool) -> None:
        if self._reachable != reachable:
            self._reachable = reachable
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _notify_later(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds + 0.001, self._notify)


def _log_failure(event: str, address: str, error: Exception) -> None:
    if isinstance(error, SpoliaError):
        log.warning(event, directory=address, error=str(error))
    else:
        log.exception(event, directory=address)
