"""Which Redis a backend uses: URLs, passwords, prefixes."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from backend_worlds import a_key, eventually
from captured_logs import captured_logs
from redis_server import RedisServer

from spolia_core.errors import InvalidRequest, Unavailable
from spolia_kvstore.redis_backend import RedisBackend

KEY = a_key(1)
SECRET = "pass:w/ord"
SECRET_IN_URL = "pass%3Aw%2Ford"


@pytest.mark.parametrize("is_cluster", [False, True], ids=["server", "cluster"])
async def test_a_wrong_password_is_said_once_without_it_and_tried_again(
    tmp_path: Path, prefix: str, is_cluster: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path, cluster=is_cluster, password="right") as server, captured_logs() as lines:
        backend = RedisBackend(server.url.replace("right", SECRET_IN_URL), prefix, timeout_s=20.0)
        await backend.start()
        try:
            await eventually(lambda: bool(lines))
            await asyncio.sleep(0.5)  # two tries more
            assert not backend.reachable
            with pytest.raises(Unavailable) as refused:
                await backend.claims([KEY])
            told = f"{refused.value} {lines} {caplog.text}"
            assert [line["event"] for line in lines] == ["redis away"]
            assert "password" in lines[0]["error"]
            assert SECRET not in told
            assert SECRET_IN_URL not in told
            server.ask("CONFIG", "SET", "requirepass", SECRET)
            await eventually(lambda: backend.reachable)
        finally:
            await backend.close()
    assert SECRET not in str(lines)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        f"http://:{SECRET_IN_URL}@host",
        f"redis+cluster+cluster://:{SECRET_IN_URL}@host",
        f"redis://:{SECRET}@host:1",
        f"redis://:{SECRET_IN_URL}@host:seventy",
        f"redis://:{SECRET_IN_URL}@host:99999",
        f"redis://:{SECRET_IN_URL}@host?db=one",
        f"redis://:{SECRET_IN_URL}@host?no_such_option=1",
        f"redis+cluster://:{SECRET_IN_URL}@host/1",
        f"redis+cluster://:{SECRET_IN_URL}@host?no_such_option=1",
        f"unix://:{SECRET_IN_URL}@",
    ],
)
def test_a_bad_url_is_refused_by_field_and_never_repeated(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        RedisBackend(url)
    told = f"{refused.value} {refused.value.actual}"
    assert refused.value.field == "redis_url"
    assert refused.value.__suppress_context__
    for part in (SECRET, SECRET_IN_URL, "w/ord", "seventy"):
        assert part not in told


@pytest.mark.parametrize("prefix", ["", "a{b", "a}b", "a b", "x" * 65, "ä"])
def test_a_prefix_that_could_be_a_hash_tag_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        RedisBackend("redis://localhost", prefix)
    assert refused.value.field == "redis_prefix"


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster", "REDIS"])
def test_every_scheme_is_known(scheme: str) -> None:
    RedisBackend(f"{scheme}://user:{SECRET_IN_URL}@localhost:6380")


async def test_a_unix_socket_will_do(tmp_path: Path, prefix: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="redis-"))  # short: the kernel's limit is about 100 bytes
    try:
        with RedisServer(tmp_path, socket_path=folder / "redis.sock"):
            backend = RedisBackend(f"unix://{folder}/redis.sock", prefix)
            await backend.start()
            try:
                await eventually(lambda: backend.reachable)
                assert await backend.claims([KEY]) == [None]
            finally:
                await backend.close()
    finally:
        shutil.rmtree(folder)
