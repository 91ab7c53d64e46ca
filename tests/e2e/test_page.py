"""The gateway's page in a headless Chromium, on a cluster of real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser, found_browser
from e2e_world import prompts

from spolia.local_cluster import LocalCluster

PATH = found_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason="no chromium on PATH: the page is not looked at")

IDLE = "!document.getElementById('send').disabled"
ORDER = "[...document.querySelectorAll('#documents li')].map((item) => item.dataset.letter).join('')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PATH is not None
    with Browser(PATH, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, cluster: LocalCluster) -> Iterator[Browser]:
    """A page just loaded; it must end without an error of its own, or a break of its policy."""
    browser.open("about:blank")
    browser.problems.clear()
    browser.open(f"http://{cluster.http_address}/#playground")
    browser.wait("document.querySelector('#model')?.textContent.includes('tokens')")
    yield browser
    assert browser.problems == []


def show_documents(page: Browser, texts: list[str]) -> None:
    """These and no others."""
    page.js("document.querySelectorAll('#documents [aria-label^=Remove]').forEach((button) => button.click())")
    for text in texts:
        page.js("document.getElementById('add').click()")
        page.js(f"[...document.querySelectorAll('#documents textarea')].at(-1).value = {text!r}")


def ask(page: Browser, number: int) -> dict[str, int]:
    """Asks for the `number`-th time; tokens by source, as the legend shows them."""
    page.js("document.getElementById('send').click()")
    page.wait(f"document.querySelectorAll('#history li').length === {number} && {IDLE}")
    shown: dict[str, int] = page.js(
        "Object.fromEntries([...document.querySelectorAll('#source-legend li')]"
        ".map((item) => [item.dataset.source, Number(item.querySelector('b').textContent.replace(',', ''))]))"
    )
    return shown


def runs(page: Browser) -> list[tuple[str, str]]:
    """The prompt as it is coloured: sources, and the text under each."""
    shown: list[Any] = page.js(
        "[...document.querySelectorAll('#tokens span')].map((run) => [run.dataset.source, run.textContent])"
    )
    return [(source, text) for source, text in shown]


def test_documents_put_into_another_order_are_shown_as_reused(page: Browser) -> None:
    inn, ship = (text.strip() for text in prompts(5, seed=91)[3:])
    show_documents(page, [inn, ship])
    first, second = page.js(ORDER)
    cold = ask(page, 1)
    assert page.js("document.getElementById('answer').textContent")
    assert page.js("document.getElementById('gain').textContent") == ""
    assert not cold.keys() & {"device", "host", "disk", "peer"}
    assert page.js("document.getElementById('misses').textContent").startswith("Not had: 2 local chunks, ")

    page.js("document.querySelector('#documents .handle').focus()")
    page.press("ArrowDown")
    assert page.js(ORDER) == second + first
    assert page.js("document.activeElement.textContent") == first, "what moves keeps the focus"
    assert page.js("document.getElementById('order-said').textContent") == f"Order: {second}, {first}"

    warm = ask(page, 2)
    assert warm["device"] > sum(warm.values()) / 2
    assert warm["link"] > 0
    assert sum(warm.values()) == sum(cold.values())
    coloured = runs(page)
    text = "".join(piece for _, piece in coloured)
    assert text.index(ship) < text.index(inn), "the prompt is shown as it was asked"
    assert "Question: " in text
    reused = "".join(piece for source, piece in coloured if source == "device")
    assert inn[-40:] in reused
    assert ship[-40:] in reused
    linked = [piece for source, piece in coloured if source == "link"]
    assert any(piece and ship.startswith(piece) for piece in linked), "link tokens head their document"
    gain = page.js("document.getElementById('gain').textContent")
    assert "in another order" in gain
    assert "was reused" not in gain
    times = page.js("[...document.querySelectorAll('#times dt')].map((name) => name.textContent)")
    assert times == ["TTFT", "Total", "Prompt", "Reused"]

    page.js("document.querySelector('[name=reuse][value=exact]').click()")
    assert set(ask(page, 3)) == {"computed"}
    assert page.js("document.getElementById('gain').textContent").endswith("None of the prompt of ask 3 was reused.")


def test_an_exact_completion_is_shown_as_it_was_asked(page: Browser) -> None:
    [story] = (text.strip() for text in prompts(5, seed=92)[4:])
    show_documents(page, [story])
    page.js("document.querySelector('[name=reuse][value=exact]').click()")
    page.js("document.getElementById('shape').value = 'completion'")
    page.js("document.getElementById('question').value = 'Caf\u00e9 \u6f22 <b>&amp;</b>'")
    ask(page, 1)
    assert "".join(text for _, text in runs(page)) == f"<s>{story}\nCaf\u00e9 \u6f22 <b>&amp;</b>"
    again = ask(page, 2)
    assert again["device"] >= 128, "a whole prefix chunk"
    assert not again.keys() & {"link", "compiled"}
    assert [source for source, _ in runs(page)] == ["device", "computed"]


REFUSING = """(() => {
  const spolia = { profile: "p", modes: ["exact"], linked_refusal: "it loses 7.5 points" };
  const told = { data: [{ id: "refusing", max_model_len: 64, spolia }] };
  const real = window.fetch;
  window.fetch = (path, options) => path === "/v1/models" ? Promise.resolve(Response.json(told)) : real(path, options);
  const dialog = document.getElementById("key-dialog");
  dialog.returnValue = "drop";
  dialog.dispatchEvent(new Event("close"));
})()"""
"""Has the page look up its model anew, and find one that may not link."""


def test_a_model_that_may_not_link_is_asked_exactly_and_the_page_says_why(page: Browser) -> None:
    page.js(REFUSING)
    page.wait("document.getElementById('model').textContent.startsWith('refusing')")
    assert page.js("document.querySelector('[name=reuse]:checked').value") == "exact"
    assert page.js("document.querySelector('[name=reuse][value=linked]').disabled")
    told = page.js("document.getElementById('reuse-hint').textContent")
    assert told.endswith("Linked is not served: it loses 7.5 points.")


def test_documents_are_dragged_by_their_letter(page: Browser) -> None:
    order = page.js(ORDER)
    assert len(order) == 4
    centre = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
    boxes = f"[...document.querySelectorAll('#documents .handle')].map((h) => {centre}(h.getBoundingClientRect()))"
    page.js("document.querySelector('#documents').scrollIntoView()")
    handles = page.js(boxes)
    x, y = handles[2]
    page.drag((handles[0][0], handles[0][1]), (x, y + 60))
    assert page.js(ORDER) == order[1] + order[2] + order[0] + order[3]
    assert page.js("document.querySelectorAll('.dragged').length") == 0
    page.js("document.getElementById('shuffle').click()")
    assert page.js(ORDER)[0] != order[1], "another document comes first, so that no prefix repeats"


def test_what_the_gateway_refuses_is_said(page: Browser) -> None:
    page.js("document.getElementById('max-tokens').value = 4096")
    page.js("document.getElementById('question').value = 'why '.repeat(9000)")
    page.js("document.getElementById('send').click()")
    page.wait(f"!document.getElementById('ask-error').hidden && {IDLE}")
    assert "tokens" in page.js("document.getElementById('ask-error').textContent")
    assert page.js("document.getElementById('past').hidden")
    page.problems[:] = [problem for problem in page.problems if "status of 400" not in problem]


@pytest.mark.slow
def test_the_cluster_is_shown_live(page: Browser, cluster: LocalCluster) -> None:
    page.js("location.hash = 'cluster'")
    page.wait(f"document.querySelectorAll('#nodes tbody tr').length === {len(cluster.nodes)}")
    shown = page.js("document.getElementById('nodes').textContent")
    for node in cluster.nodes:
        assert node.address in shown
    assert page.js("document.querySelectorAll('#nodes [role=img]').length") >= 2, "pools are bars"
    assert page.js("document.getElementById('cluster-state').textContent").startswith("live")
    assert "Chunks in RAM" in page.js("document.getElementById('figures').textContent")
    looks = "performance.getEntriesByType('resource').filter(({ name }) => name.endsWith('/cluster')).length"
    page.wait(f"{looks} >= 3")
    page.js("location.hash = 'playground'")
    page.wait("document.getElementById('cluster').hidden")
    num_looks = page.js(looks)
    time.sleep(1.5)
    assert page.js(looks) <= num_looks + 1, "who does not look asks for nothing"


REFUSES_STRANGERS = """
    window.keys = [];
    window.fetch = async (path, { headers }) => {
        keys.push(headers.authorization ?? "");
        const error = { message: "an API key is wanted", code: "invalid_api_key" };
        return new Response(JSON.stringify({ error }), { status: 401 });
    };
"""


def test_a_key_is_asked_for_once_and_kept_for_the_tab_only(page: Browser) -> None:
    page.js(REFUSES_STRANGERS)
    page.js("document.getElementById('send').click()")
    page.wait("document.getElementById('key-dialog').open")
    assert page.js("document.getElementById('ask-error').textContent") == "an API key is wanted"
    page.js("document.getElementById('key').value = 'sk-1'")
    page.js("document.querySelector('#key-dialog [value=use]').click()")
    page.wait("window.keys.at(-1) === 'Bearer sk-1'")
    assert page.js("window.keys[0]") == ""
    assert page.js("sessionStorage.getItem('spolia-key')") == "sk-1"
    assert page.js("document.getElementById('key').value") == ""
    assert page.js("JSON.stringify(localStorage)") == "{}"
    page.js("document.getElementById('send').click()")
    page.wait(f"window.keys.length >= 3 && {IDLE}")
    assert not page.js("document.getElementById('key-dialog').open"), "it opens by itself once; then there is a button"
    assert not page.js("document.getElementById('key-button').hidden")
    page.js("sessionStorage.clear()")


@pytest.mark.parametrize("view", ["cluster", "playground"])
def test_nothing_is_wider_than_a_small_telephone(page: Browser, view: str) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    try:
        page.js(f"location.hash = {view!r}")
        page.wait(f"!document.getElementById({view!r}).hidden")
        assert page.js("document.documentElement.scrollWidth") <= 360
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_the_theme_follows_the_system_until_it_is_chosen(page: Browser) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    light = page.js(ground)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = page.js(ground)
    assert light != dark
    try:
        page.js("document.getElementById('theme').click()")
        assert page.js(ground) == light
    finally:
        page.js("localStorage.clear()")
        page.call("Emulation.setEmulatedMedia", features=[])
