"""The page against a gateway that asks for keys: who is refused, who gets in, and what each is shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import Browser, found_browser
from tiny_cluster import TENANT, WAIT_S, a_world
from tiny_gateway import a_gateway

from spolia import AsyncClient
from spolia_core.key_book import Role, new_key
from spolia_core.key_file import KeyFile

PATH = found_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason="no chromium on PATH: the page is not looked at")

ROLES = {"acme": Role.USER, "bolt": Role.USER, "ops": Role.OPERATOR}
IDLE = "!document.getElementById('send').disabled"
REQUEST_ID = "the-stones-of-acme"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PATH is not None
    with Browser(PATH, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@dataclass
class Guarded:
    """A gateway on a tiny cluster, and a key of each tenant."""

    url: str
    key_of: dict[str, str]


@asynccontextmanager
async def guarded(model: Path, folder: Path) -> AsyncIterator[Guarded]:
    """While it is there, a request of acme's is under way nearly all the time."""
    keys, key_of = KeyFile(folder / "keys.json"), {}
    for tenant, role in ROLES.items():
        key_of[tenant], record = new_key(tenant, frozenset({role}))
        keys.change(lambda book, record=record: book.with_key(record))  # type: ignore[misc]  # bound now
    async with a_world(model) as world:
        await world.store()
        await world.prefill()
        await world.decode()
        async with a_gateway(world, TENANT, keys=keys.name, http_port=0) as gateway:
            asking = asyncio.create_task(_ask(gateway.server.address, key_of["acme"]))
            try:
                yield Guarded(f"http://{gateway.http_address}", key_of)
                assert not asking.done(), asking.exception()
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)


async def _ask(address: str, key: str) -> None:
    async with AsyncClient(address, timeout_s=WAIT_S, api_key=key) as client:
        while True:
            await client.generate("WHO?", max_tokens=300, ignore_eos=True, request_id=REQUEST_ID)


def test_the_page_shows_to_each_key_what_is_its_own(browser: Browser, tiny: Path, tmp_path: Path) -> None:
    async def looked_at() -> None:
        async with guarded(tiny, tmp_path) as gateway:
            await asyncio.to_thread(look, browser, gateway)

    asyncio.run(looked_at())


def look(page: Browser, gateway: Guarded) -> None:
    page.open(f"{gateway.url}/#cluster")
    page.wait("document.getElementById('key-dialog')?.open")  # it asks by itself
    assert page.js("document.getElementById('cluster-error').textContent").startswith("an API key is needed")

    use(page, "sk-spolia-nobody")
    page.wait("document.getElementById('cluster-error').textContent === 'this API key is not known'")
    assert shown(page) == ""

    use(page, gateway.key_of["ops"])
    page.wait(f"document.getElementById('requests').textContent.includes({REQUEST_ID!r})")
    assert "acme" in shown(page)
    assert page.js("document.getElementById('cluster-error').hidden")

    use(page, gateway.key_of["bolt"])
    page.wait("document.getElementById('cluster-error').textContent.includes('operator')")
    assert shown(page) == "", "what the operator was shown is gone"

    page.js("location.hash = 'playground'")
    page.js("document.getElementById('shape').value = 'completion'")
    page.js("document.querySelectorAll('#documents [aria-label^=Remove]').forEach((button) => button.click())")
    page.js("document.getElementById('question').value = 'WHO?'")
    page.js("document.getElementById('max-tokens').value = 4")
    page.js("document.getElementById('send').click()")
    page.wait(f"document.querySelectorAll('#history li').length === 1 && {IDLE}")
    assert page.js("document.getElementById('ask-error').hidden")

    use(page, "sk-spolia-nobody")
    page.js("document.getElementById('send').click()")
    page.wait("document.getElementById('ask-error').textContent === 'this API key is not known'")
    assert all("status of 40" in problem for problem in page.problems), page.problems


def use(page: Browser, key: str) -> None:
    """Types a key into the dialog."""
    page.js("document.getElementById('key-dialog').open || document.getElementById('key-button').click()")
    page.js(f"document.getElementById('key').value = {key!r}")
    page.js("document.querySelector('#key-dialog [value=use]').click()")


def shown(page: Browser) -> str:
    """Nodes and requests of the cluster's view."""
    told: str = page.js(
        "document.getElementById('nodes').tBodies[0].textContent + document.getElementById('requests').textContent"
    )
    return told
