"""A book of API keys in Redis: one string, read and replaced whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urldefrag

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, WatchError
from redis.retry import Retry

from spolia_core.errors import Busy, InvalidRequest, Unavailable
from spolia_core.key_book import KeyBook

DEFAULT_NAME = "spolia:keys"
TIMEOUT_S = 2.0
MAX_TRIES = 10


class KeysInRedis:
    """The string that a URL names behind its "#", `spolia:keys` where it names none."""

    def __init__(self, url: str) -> None:
        address, name = urldefrag(url)
        self._key = name or DEFAULT_NAME
        try:
            self._redis = Redis.from_url(
                address, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 1)
            )
        except ValueError as error:
            raise InvalidRequest(f"keys: this is no URL of a Redis: {error}", field="keys") from error

    @property
    def name(self) -> str:
        """Its key; the URL may have a password in it."""
        return f"{self._key} in Redis"

    def read(self) -> bytes:
        """See `KeyPlace`. Empty where nothing has been written."""
        with self._errors():
            return _bytes_of(self._redis.get(self._key))

    def change(self, change: Callable[[KeyBook], KeyBook]) -> None:
        """See `KeyPlace`. Raises `Busy` when others change it all the time."""
        with self._errors():
            for _ in range(MAX_TRIES):
                if self._changed(change):
                    return
        raise Busy(f"keys: {self.name} is being changed by others", field="keys", retry_after_ms=100)

    def _changed(self, change: Callable[[KeyBook], KeyBook]) -> bool:
        with self._redis.pipeline() as pipeline:
            pipeline.watch(self._key)  # type: ignore[no-untyped-call]  # upstream
            new = change(KeyBook.from_bytes(_bytes_of(pipeline.get(self._key)))).to_bytes()
            pipeline.multi()
            pipeline.set(self._key, new)
            try:
                pipeline.execute()
            except WatchError:
                return False
        return True

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RedisError as error:
            raise Unavailable(f"keys: {self.name} cannot be reached: {type(error).__name__}", field="keys") from error


def _bytes_of(found: object) -> bytes:
    return found if isinstance(found, bytes) else b""
