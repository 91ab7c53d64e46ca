"""A whole cluster in a thread of its own, for fuzzers that call from outside it, and what must be so when they stop.

`FuzzWorld.at_rest` fails unless every ledger is empty, and tasks, file descriptors and threads are as many as before.
What would only be written to a log counts too: an exception that nobody expected, or that no one heard, is a finding.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from tiny_cluster import World, eventually
from tiny_gateway import a_gateway

from spolia_core.key_book import Role, TenantLimits, new_key
from spolia_core.key_file import KeyFile
from spolia_decode.node import DecodeNode
from spolia_gateway.node import GatewayNode
from spolia_kvstore.disk_tier import NUM_THREADS as NUM_DISK_THREADS
from spolia_kvstore.disk_tier import DiskTier
from spolia_kvstore.node import KVStoreNode
from spolia_node.channels import channel_options
from spolia_prefill.node import PrefillNode

T = TypeVar("T")

PATIENCE_S = 60.0
NUM_WORKER_THREADS = 4
BAD_CODES = ("INTERNAL", "UNKNOWN")
LIMITS = TenantLimits(max_requests=4, max_tokens=4000)


class _Ear(logging.Handler):
    """Hears what libraries log as an error."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        self._findings.append(f"{record.name}: {record.getMessage()} {record.exc_info}")


class FuzzWorld:
    """Nodes, keys by who has them, and a channel to each node. Its methods are called from other threads."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fuzzed", daemon=True)
        self.findings: list[str] = []
        """What was logged as nobody's fault but ours."""
        self.keys: dict[str, str | None] = {"nobody": None, "stranger": "sk-spolia-unknown"}
        self.channels: dict[str, grpc.aio.Channel] = {}
        self.store: KVStoreNode
        self.other_store: KVStoreNode
        self.prefill: PrefillNode
        self.decode: DecodeNode
        self.gateway: GatewayNode

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, done in the cluster's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    @contextmanager
    def running(self) -> Iterator[FuzzWorld]:
        """Starts it; ends it, and fails for what was found meanwhile."""
        before = structlog.get_config()
        structlog.reset_defaults()
        structlog.configure(processors=[self._note])
        ear = _Ear(self.findings)
        logging.getLogger().addHandler(ear)
        self._thread.start()
        stack = AsyncExitStack()
        try:
            self.run(self._start(stack))
            yield self
        finally:
            try:
                self.run(stack.aclose())
            finally:
                logging.getLogger().removeHandler(ear)
                structlog.configure(**before)
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(PATIENCE_S)
        assert not self.findings, self.findings

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Around fuzzing: all is at the end as it was before."""
        self.run(self._settled())
        before = self.run(self._open())
        yield
        self.run(self._settled())
        self._look_at_metrics()
        self.run(self._as_before(before))
        found = list(self.findings)
        self.findings.clear()
        assert not found, found

    async def _start(self, stack: AsyncExitStack) -> None:
        self._loop.set_exception_handler(lambda _, context: self._unheard(context))
        # Threads of a pool stay once they were needed: all of them are here before anything is counted.
        pool = ThreadPoolExecutor(NUM_WORKER_THREADS)
        self._loop.set_default_executor(pool)
        gate = threading.Barrier(NUM_WORKER_THREADS)
        await asyncio.gather(*(asyncio.to_thread(gate.wait) for _ in range(NUM_WORKER_THREADS)))
        world = await self._nodes(stack)
        keys = self._write_keys()
        settings = {"keys": keys, "http_port": 0, "default_timeout_s": 5.0, "rpc_timeout_s": 5.0, "log_level": "debug"}
        self.gateway = await stack.enter_async_context(a_gateway(world, "default", **settings))
        named = {
            "store": self.store,
            "directory": self.other_store,
            "prefill": self.prefill,
            "decode": self.decode,
            "gateway": self.gateway,
        }
        for name, node in named.items():
            channel = grpc.aio.insecure_channel(node.server.address, options=channel_options(16 << 20))
            self.channels[name] = await stack.enter_async_context(channel)
            await channel.channel_ready()

    async def _nodes(self, stack: AsyncExitStack) -> World:
        world = World(self._model, await stack.enter_async_context(AsyncExitStack()))
        self.world = world
        short = {"claim_ttl_ms": 200, "pin_lease_ms": 200, "max_object_bytes": 1 << 20, "node_lease_ms": 60_000}
        self.other_store = await world.store(**short)
        self.store = await world.store(data_dir=self._folder / "data", **short)
        for each in (self.store, self.other_store):
            if each.store.tiers.disk is not None:
                await self._all_threads_of(each.store.tiers.disk)
        # Once its second connection has ended, SQLite keeps one more descriptor of the index, and uses it again.
        disk = self.store.store.tiers.disk
        assert disk is not None
        await disk.in_thread(disk.catalog.checkpoint)
        quick = {"rpc_timeout_s": 5.0, "log_level": "debug"}
        self.prefill = await world.prefill(**quick)
        self.decode = await world.decode(local_prefill_tokens=0, **quick)
        return world

    async def _all_threads_of(self, disk: DiskTier) -> None:
        """Threads that a disk has use for are all here before anything is counted, as those of the loop are."""
        gate = threading.Barrier(NUM_DISK_THREADS)
        await asyncio.gather(*(disk.in_thread(gate.wait) for _ in range(NUM_DISK_THREADS)))

    def _write_keys(self) -> str:
        place = KeyFile(self._folder / "keys.json")
        for who, role, ends in (
            ("user", Role.USER, None),
            ("operator", Role.OPERATOR, None),
            ("late", Role.USER, datetime.now(UTC) - timedelta(days=1)),
        ):
            self.keys[who], record = new_key(who, frozenset({role}), expires_at=ends)
            place.change(lambda book, record=record: book.with_key(record))  # type: ignore[misc]  # bound now
        place.change(lambda book: book.with_limits("user", LIMITS))
        return place.name

    def _note(self, _logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if method in ("error", "exception", "critical"):
            self.findings.append(repr(dict(event)))
        raise structlog.DropEvent

    def _unheard(self, context: dict[str, Any]) -> None:
        self.findings.append(f"nobody heard of {context!r}")

    def _look_at_metrics(self) -> None:
        for node in (self.gateway, self.decode, self.prefill, self.store, self.other_store):
            for sample in node.server.metrics.registry.collect():
                if sample.name != "spolia_rpc_requests":
                    continue
                bad = [each.labels for each in sample.samples if each.labels.get("code") in BAD_CODES and each.value]
                self.findings.extend(f"{node.config.node_id} ended calls with {labels}" for labels in bad)

    async def _settled(self) -> None:
        """Returns when nothing is held."""
        await self.world.nothing_held()
        for store in self.world.stores:
            await eventually(lambda s=store: s.store.pins.num_live == 0, "the store has a pin")
        gateway, http = self.gateway.gateway, self.gateway._http
        assert http is not None
        await eventually(lambda: gateway.num_running == 0, "the gateway counts a request")
        await eventually(lambda: not gateway.use.requests and not gateway.use.tokens, "a tenant holds something")
        await eventually(lambda: http._calls.num_running == 0, "an HTTP call is under way")
        await eventually(lambda: not http._uvicorn.server_state.connections, "an HTTP connection is open")
        self.decode.engine.pool.check_invariants()

    async def _open(self) -> Counter[str]:
        """What an operating system and an event loop hold for this process, by kind."""
        gc.collect()
        files = (_kind_of(number) for number in os.listdir("/proc/self/fd"))
        threads = (f"thread {_unnumbered(thread.name)}" for thread in threading.enumerate())
        tasks = (f"task {getattr(task.get_coro(), '__qualname__', 'unnamed')}" for task in asyncio.all_tasks())
        return Counter([*files, *threads, *tasks])

    async def _as_before(self, before: Counter[str]) -> None:
        """Returns when no more is open than was. Fails, naming what is more, when that does not come to be."""
        until = self._loop.time() + PATIENCE_S / 4
        while more := self._more(await self._open(), before):
            assert self._loop.time() < until, more
            await asyncio.sleep(0.2)

    def _more(self, now: Counter[str], before: Counter[str]) -> Counter[str]:
        return Counter({kind: num for kind, num in (now - before).items() if num > _slack(kind)})


def _slack(kind: str) -> float:
    """How many more of a kind are no leak."""
    if kind.startswith("task "):
        return 12  # streams of the directory, which begin anew on a busy machine, and wait in one task or in several
    return 0


def _kind_of(number: str) -> str:
    try:
        return f"file {_unnumbered(os.readlink(f'/proc/self/fd/{number}'))}"
    except OSError:
        return "file of the listing"


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)
