"""Laws of `spolia cluster`: everything there is is shown, once or for as long as one looks."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cli_runs import Spolia
from fake_gateway import FakeGateway
from rich.console import Console

from spolia import Client, Unavailable
from spolia.cli import cluster as command
from spolia.cli.cluster_view import View
from spolia.v1 import common_pb2, directory_pb2, gateway_pb2, kvstore_pb2

GATEWAY = directory_pb2.NodeRecord(
    node_id="gateway-1",
    role=directory_pb2.NODE_ROLE_GATEWAY,
    address="127.0.0.1:9",
    metrics_address="127.0.0.1:9464",
    load=directory_pb2.NodeLoad(
        num_running=2,
        serving=directory_pb2.ServingFigures(
            window_s=30,
            num_requests=12,
            num_prompt_tokens=1000,
            num_cached_tokens=830,
            num_generated_tokens=600,
            ttft_p50_ms=144.2,
            ttft_p95_ms=1599,
            itl_p50_ms=8.1,
            itl_p95_ms=31,
        ),
    ),
)
STORE = directory_pb2.NodeRecord(
    node_id="store-1",
    role=directory_pb2.NODE_ROLE_KVSTORE,
    address="127.0.0.1:8",
    draining=True,
    load=directory_pb2.NodeLoad(
        tiers=[
            kvstore_pb2.TierStats(
                tier=tier, num_objects=17, used_bytes=6 << 20, budget_bytes=1 << 30, hits=5, healthy=healthy
            )
            for tier, healthy in ((common_pb2.TIER_RAM, True), (common_pb2.TIER_DISK, False))
        ]
    ),
)


def in_flight(number: int) -> gateway_pb2.RequestInFlight:
    return gateway_pb2.RequestInFlight(
        request_id=f"[red]request-{number}",
        phase=gateway_pb2.REQUEST_PHASE_DECODING,
        age_ms=1400,
        mode=common_pb2.REUSE_MODE_LINKED,
        num_prompt_tokens=314,
        num_generated_tokens=41,
        decode_node="decode-1",
    )


@pytest.fixture
def busy(gateway: FakeGateway) -> FakeGateway:
    """A gateway with something to show."""
    gateway.more_nodes += [GATEWAY, STORE]
    gateway.in_flight += map(in_flight, range(40))
    return gateway


SHOWN = (
    *(
        "gateway-1",
        "decode-1",
        "store-1",
        "draining",
        "83 %",
        "144 ms",
        "1.6 s",
        "8.1 ms",
        "20.0",
        "6.0 MiB",
        "1.0 GiB",
    ),
    *("failing", "[red]request-0", "decoding", "linked", "314", "41"),
)


def test_once_prints_all_there_is_and_so_does_a_pipe(spolia: Spolia, busy: FakeGateway) -> None:
    for argv in (["cluster"], ["cluster", "--once"]):
        done = spolia(*argv)
        assert done.code == 0
        assert all(word in done.out for word in SHOWN), done.out
        assert done.out.count("[red]request-") == 40


def test_json_has_every_figure(spolia: Spolia, busy: FakeGateway) -> None:
    found = spolia("cluster", "--json").json
    nodes = {node["node_id"]: node for node in found["nodes"]}
    assert nodes["gateway-1"]["serving"]["num_cached_tokens"] == 830
    assert nodes["gateway-1"]["metrics_address"] == "127.0.0.1:9464"
    assert nodes["decode-1"]["serving"] is None
    assert [tier["tier"] for tier in nodes["store-1"]["tiers"]] == ["ram", "disk"]
    assert len(found["requests"]) == 40
    assert (found["requests"][0]["phase"], found["requests"][0]["mode"]) == ("decoding", "linked")


def test_without_the_directory_nobody_says_that_a_node_serves_but_the_gateway_that_answers(
    spolia: Spolia, busy: FakeGateway
) -> None:
    busy.directory_reachable, busy.node_id = False, "gateway-1"
    done = spolia("cluster")
    states = {line.split()[0]: line.split()[-1] for line in done.out.splitlines()[1:4]}
    assert states == {"decode-1": "unknown", "gateway-1": "serving", "store-1": "unknown"}
    with Client(busy.address) as client:
        text = drawn(View(busy.address, client.cluster()))
    assert text.count("unknown") == 2
    assert text.count("serving") == 1


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "4000"])
def test_an_interval_out_of_range_asks_nobody(interval: str, spolia: Spolia, gateway: FakeGateway) -> None:
    done = spolia("cluster", "--interval", interval)
    assert (done.code, gateway.requests) == (2, [])
    assert "interval" in done.err


@pytest.mark.parametrize("command", ["cluster", "doctor", "chat"])
def test_an_address_that_is_no_option_is_told_to_be_one(command: str, spolia: Spolia, gateway: FakeGateway) -> None:
    done = spolia(command, "127.0.0.1:7400")
    assert done.code == 2
    assert f"spolia {command} takes options only, not '127.0.0.1:7400'" in done.err
    assert f"spolia {command} -a 127.0.0.1:7400" in done.err
    other = spolia(command, "now")
    assert other.code == 2
    assert "takes options only, not 'now'" in other.err
    assert "-a" not in other.err
    assert spolia(command, "--nothing").code == 2, "no option is a stray"
    assert not gateway.requests


def drawn(view: View, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=160, height=height, force_terminal=False, color_system=None)
    console.print(view, height=height)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_view_shows_all_of_it_and_as_many_requests_as_fit(busy: FakeGateway) -> None:
    with Client(busy.address) as client:
        view = View(busy.address, client.cluster())
    text = drawn(view)
    assert all(word in text for word in SHOWN), text
    assert "40 requests in flight" in text
    shown = text.count("[red]request-")
    assert 5 <= shown < 40
    assert f"… and {40 - shown} more" in text
    assert len(text.splitlines()) <= 40
    # Of 64 blocks 13 are referenced, 3 arriving, 2 lent and 12 cached; each has its cells of the bar.
    assert "█" * 11 + "·" * 13 in text


def test_the_view_says_since_when_nothing_was_heard(busy: FakeGateway) -> None:
    now = 100.0
    with Client(busy.address) as client:
        found = client.cluster()
    view = View(busy.address, found, lambda: now)
    now += 42
    view.missed(Unavailable("connection refused"))
    assert "no answer for 42s: connection refused" in drawn(view)
    assert "decode-1" in drawn(view), "what was seen last stays"
    view.saw(found)
    assert "no answer" not in drawn(view)


def test_a_live_view_outlasts_its_gateway_and_ends_with_ctrl_c(
    busy: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away() -> None:
        busy.failure = Unavailable("draining")

    def back() -> None:
        busy.failure = None

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    steps: Iterator[Callable[[], None]] = iter([away, back, ctrl_c])
    monkeypatch.setattr(command.time, "sleep", lambda seconds: next(steps)())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    seen: list[Any] = []
    monkeypatch.setattr(View, "missed", lambda self, error: seen.append(error))
    monkeypatch.setattr(View, "saw", lambda self, found: seen.append(found))
    command.cluster(address=busy.address)
    assert [type(each).__name__ for each in seen] == ["Unavailable", "Cluster"]
