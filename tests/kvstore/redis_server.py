"""The real Redis of the benchmarks, for tests: where none is installed, what needs one is skipped."""

from pathlib import Path

import pytest

from spolia_bench import redis_server


class RedisServer(redis_server.RedisServer):
    """Skips the test that asks for it where there is no Redis to run."""

    def __init__(
        self, folder: Path, *, cluster: bool = False, password: str = "", socket_path: Path | None = None
    ) -> None:
        try:
            super().__init__(folder, cluster=cluster, password=password, socket_path=socket_path)
        except redis_server.NoRedis as error:
            pytest.skip(str(error))
