"""One question to many stores at once."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from typing import TypeVar

import grpc

from spolia.connection import check_address
from spolia.lifetime import Lifetime
from spolia.operator_tls import store_channel, tls_folder
from spolia.spoken import PROBE_TIMEOUT_S, may_speak_otherwise, store_speaks_otherwise
from spolia.store_results import PerStore
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.errors import SpoliaError

T = TypeVar("T")


class StoreConnection:
    """A channel to one store. Nothing is sent before the first call."""

    def __init__(self, address: str, tls_dir: str | os.PathLike[str] | None = None) -> None:
        self.address = check_address(address)
        self.is_plaintext = not tls_folder(tls_dir)
        self._channel = store_channel(address, tls_dir)
        self.stub = KVStoreServiceStub(self._channel)

    def close(self) -> None:
        """Ends the calls under way."""
        self._channel.close()


class Question:
    """What the calls made for one question share: a time limit, and the name under which nodes log them."""

    def __init__(self, timeout_s: float) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self.metadata = (("x-request-id", uuid.uuid4().hex),)

    @property
    def timeout_s(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._deadline_s - time.monotonic())

    def part(self, fraction: float) -> Question:
        """The same with `fraction` (0 … 1) of what is left: for a try that must leave time for others."""
        part = copy(self)
        part._deadline_s = time.monotonic() + self.timeout_s * fraction
        return part


class _CallersError(Exception):
    """Carries, as its cause, what the caller's own code raised: it is no store's failure, whatever its class."""


@contextmanager
def callers_own() -> Iterator[None]:
    """Around code of the caller within `ask`: what it raises ends the whole and is passed on."""
    try:
        yield
    except Exception as error:
        raise _CallersError from error


def ask_all(
    stores: Sequence[StoreConnection],
    ask: Callable[[StoreConnection], T],
    lifetime: Lifetime,
    end: Callable[[], None],
) -> PerStore[T]:
    """Asks all `stores` side by side, and waits for each.

    Raises the first store's error when every store fails. Anything but a `SpoliaError`, and an interrupt of the wait,
    calls `end`, which must end the calls, and is passed on.
    """

    def ask_one(store: StoreConnection) -> T | SpoliaError:
        try:
            with lifetime.call(), _spoken_to(store):
                return ask(store)
        except SpoliaError as error:
            return about(store.address, error)

    with ThreadPoolExecutor(max_workers=len(stores), thread_name_prefix="spolia-store") as pool:
        waiting = {store.address: pool.submit(ask_one, store) for store in stores}
        try:
            outcomes = {address: outcome.result() for address, outcome in waiting.items()}
        except BaseException as error:
            end()
            if isinstance(error, _CallersError) and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
    failed = {address: outcome for address, outcome in outcomes.items() if isinstance(outcome, SpoliaError)}
    if len(failed) == len(stores):
        raise next(iter(failed.values()))
    answers = {address: outcome for address, outcome in outcomes.items() if not isinstance(outcome, SpoliaError)}
    return PerStore(answers, failed)


@contextmanager
def _spoken_to(store: StoreConnection) -> Iterator[None]:
    """Around a call: tells a store that speaks another protocol from one that is away."""
    try:
        yield
    except grpc.RpcError as error:
        if may_speak_otherwise(error):
            other = store_speaks_otherwise(store.address, plaintext=store.is_plaintext, timeout_s=PROBE_TIMEOUT_S)
            if other is not None:
                raise other from error
        raise


def about(address: str, error: SpoliaError) -> SpoliaError:
    """`error`, saying at which store it was met."""
    said = type(error)(
        f"store {address}: {error.message}",
        field=error.field,
        limit=error.limit,
        actual=error.actual,
        retry_after_ms=error.retry_after_ms,
    )
    said.__cause__ = error
    return said
