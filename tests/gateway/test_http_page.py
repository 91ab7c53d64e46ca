"""The page's files, and what only it asks for. What it does in a browser is in tests/e2e/test_page.py."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_fakes import FakeDecode
from http_worlds import HttpWorld, http_world, says

from spolia.v1 import common_pb2, directory_pb2
from spolia_gateway.http.message_json import message_json
from spolia_gateway.http.page_files import FILES

MAX_BYTES = 60_000


@pytest.fixture
async def met(model: Path) -> AsyncIterator[HttpWorld]:
    async with http_world(model, [FakeDecode("d0", says)]) as made:
        yield made


async def test_every_file_of_the_page_is_served_with_its_type_and_under_the_policy(met: HttpWorld) -> None:
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for name in FILES:
        answer = await met.http.get("/" if name == "index.html" else f"/page/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].split(";")[0] == types[name.rpartition(".")[2]]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in answer.headers["content-security-policy"]


async def test_a_file_that_did_not_change_is_not_sent_again(met: HttpWorld) -> None:
    first = await met.http.get("/page/main.js")
    again = await met.http.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert (await met.http.get("/page/main.js", headers={"if-none-match": '"other"'})).status_code == 200
    assert (await met.http.head("/")).headers["content-length"] == str(len(FILES["index.html"].content))


async def test_nothing_else_is_served_beside_the_page(met: HttpWorld) -> None:
    for path in ("/page/none.js", "/page/", "/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/..%2f..%2fconfig.py"):
        answer = await met.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url"), path
    assert not {path for path in (await met.http.get("/openapi.json")).json()["paths"] if "page" in path}


def test_the_page_is_small_and_needs_nothing_from_elsewhere() -> None:
    assert sum(len(file.content) for file in FILES.values()) < MAX_BYTES
    for name, file in FILES.items():
        text = file.content.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|url\(|@import", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
        for module in re.findall(r'from "\./([\w.]+)"', text):
            assert module in FILES, f"{name} imports {module}"
    index = FILES["index.html"].content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index)
    assert {path.removeprefix("/page/") for path in re.findall(r'(?:src|href)="(/[^"]+)"', index)} <= FILES.keys()


async def test_the_cluster_is_told_as_json(met: HttpWorld) -> None:
    answer = await met.http.get("/cluster")
    assert answer.headers["cache-control"] == "no-store"
    told = answer.json()
    assert told["directory_reachable"] is True
    [decode] = [node for node in told["nodes"] if node["role"] == "decode"]
    assert decode["node_id"] == "d0"
    assert decode["load"]["num_running"] == 0
    assert decode["num_held_chunks"] == decode["num_held_prefixes"] == 0
    assert "held_chunks" not in decode


def test_a_message_is_told_field_by_field() -> None:
    record = directory_pb2.NodeRecord(
        node_id="n",
        role=directory_pb2.NODE_ROLE_KVSTORE,
        load=directory_pb2.NodeLoad(queued_tokens=2**40),
        held_chunks=[b"\x01\xff"],
    )
    told = message_json(record, without=("version",))
    assert told["role"] == "kvstore"
    assert told["load"]["queued_tokens"] == 2**40, "a number, however long"
    assert told["load"]["num_running"] == 0, "zeros are told"
    assert told["held_chunks"] == ["01ff"]
    assert "model" not in told, "what is unset is left out"
    assert "version" not in told
    count = common_pb2.SourceCount(source=common_pb2.TokenSource.ValueType(99), num_tokens=1)
    assert message_json(count) == {"source": "unknown_99", "num_tokens": 1}
