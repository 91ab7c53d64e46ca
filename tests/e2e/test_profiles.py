"""A profile is obeyed from the client to the last node, by processes that know each other by the wire alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_world import ledgers_are_empty, num_equal, wait_until

from spolia import Client, Document, NotSupported, Result, TokenSource
from spolia.cli.app import run
from spolia.local_cluster import LocalCluster
from spolia.local_node import NodeRefused
from spolia_core.profile import PROFILE_FILE, LinkPolicy, PolicyLoss, ReuseProfile, profile_path, save_profile
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.engine import Completion, Engine

pytestmark = pytest.mark.slow

POLICY = LinkPolicy(num_link_tokens=2, num_sink_tokens=4)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FIRST, SECOND = LETTERS * 3, LETTERS[::-1] * 2
QUESTION = "WHO"
NUM_TOKENS = 12


@dataclass(frozen=True)
class Forbidding:
    """A cluster whose profile forbids LINKED."""

    cluster: LocalCluster
    model: Path
    profile: ReuseProfile


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a begin-of-sequence token, of which sinks are made."""
    from tiny_cluster import write_model

    model = write_model(tmp_path_factory.mktemp("tiny") / "tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": 3}))
    return model


@pytest.fixture(scope="module")
def forbidding(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forbidding]:
    fingerprint = Engine.load(tiny, pool_bytes=1 << 20).adapter.fingerprint.hex()
    loss = PolicyLoss(POLICY.name, 0.25, 7.5, 0.05)
    profile = ReuseProfile(fingerprint, False, POLICY, measured=(loss,))
    folder, logs = tmp_path_factory.mktemp("profiles"), tmp_path_factory.mktemp("logs")
    save_profile(profile, profile_path(folder, fingerprint))
    with LocalCluster(tiny, num_decode=2, profile_dir=folder, log_dir=logs) as running:
        yield Forbidding(running, tiny, profile)


@pytest.fixture
def asking(forbidding: Forbidding) -> Iterator[Client]:
    with Client(forbidding.cluster.address, timeout_s=60.0) as client:
        yield client


def linked(client: Client, *, force_linked: bool = False) -> Result:
    parts = [Document(FIRST), Document(SECOND), QUESTION]
    return client.generate(parts, mode="linked", max_tokens=NUM_TOKENS, force_linked=force_linked)


def in_one_process(model: Path, client: Client) -> Completion:
    """The answer of a single process with the profile's recipe and link tokens, nothing cached."""
    engine = Engine.load(model, pool_bytes=16 << 20, num_sink_tokens=POLICY.num_sink_tokens)
    documents = [engine.chunk(client.tokenize(text)) for text in (FIRST, SECOND)]
    prompt = Prompt((*documents, Part(tuple(client.tokenize(QUESTION)))))
    params = SamplingParams(max_tokens=NUM_TOKENS)
    return engine.generate(prompt, params, mode=ReuseMode.LINKED, num_link_tokens=POLICY.num_link_tokens)


def test_linked_is_refused_with_the_figures_and_nothing_is_held(forbidding: Forbidding, asking: Client) -> None:
    with pytest.raises(NotSupported) as caught:
        linked(asking)
    assert caught.value.field == "profile"
    words = (forbidding.profile.name, "0.25 nats", "7.5 points", "EXACT", "force_linked")
    assert all(word in caught.value.message for word in words)
    exact = asking.generate([Document(FIRST), QUESTION], max_tokens=4)
    assert (exact.reuse.profile, exact.reuse.link_tokens_per_chunk) == (forbidding.profile.name, 0)
    wait_until("every ledger is empty", lambda: ledgers_are_empty(asking))
    assert not any(node.num_held_chunks for node in asking.cluster().nodes)


def test_forced_answers_equal_one_process_with_the_same_sinks_and_name_the_profile(
    forbidding: Forbidding, asking: Client
) -> None:
    expected = in_one_process(forbidding.model, asking)
    cold = linked(asking, force_linked=True)
    num_equal(expected, cold.token_ids)
    reuse = cold.reuse
    assert (reuse.forced, reuse.profile) == (True, forbidding.profile.name)
    assert (reuse.link_tokens_per_chunk, reuse.sink_tokens_per_chunk) == (2, 4)
    assert reuse.sources[TokenSource.LINK] == 2 * 2, "behind sinks the first document is linked too"
    assert any(node.startswith("prefill") for node in reuse.nodes), reuse
    wait_until("the gateway knows who holds them", lambda: is_held_by_one_at_rest(asking, reuse.nodes))
    warm = linked(asking, force_linked=True)
    num_equal(expected, warm.token_ids)
    # The same prompt again, at the same node: its link tokens are known too.
    assert warm.reuse.num_reused_tokens == len(FIRST) + len(SECOND)


def is_held_by_one_at_rest(client: Client, node_ids: Sequence[str]) -> bool:
    """Whether one of these decode nodes holds both documents, and none is listed as busy, which could send a request to
    the other.
    """
    decodes = [node for node in client.cluster().nodes if node.role == "decode"]
    held = [node.num_held_chunks for node in decodes if node.node_id in node_ids]
    return max(held, default=0) >= 2 and not any(node.num_running for node in decodes)


def test_warmed_documents_are_found_under_the_profiles_recipe(asking: Client) -> None:
    text = LETTERS.upper() * 3
    asking.warm([text])
    found = asking.generate([Document(text), QUESTION], mode="linked", max_tokens=2, force_linked=True)
    assert not found.reuse.misses
    assert found.reuse.num_reused_tokens == len(text) - 2


def test_models_and_cluster_show_the_profile_and_why_linked_is_refused(forbidding: Forbidding, asking: Client) -> None:
    (model,) = asking.models()
    assert (model.profile, model.policy) == (forbidding.profile.name, "sinks:4+link:2")
    assert (model.modes, model.can_force_linked) == ((ReuseMode.EXACT,), True)
    assert model.linked_refusal == forbidding.profile.why_forbidden()
    engines = [node for node in asking.cluster().nodes if node.role in ("prefill", "decode")]
    assert {(node.profile, node.linked_refusal) for node in engines} == {(model.profile, model.linked_refusal)}


def exit_code_of(argv: list[str]) -> int:
    try:
        return run(argv)
    except SystemExit as ended:
        return int(ended.code or 0)


def test_the_command_line_says_it_in_words(forbidding: Forbidding, capsys: pytest.CaptureFixture[str]) -> None:
    address, name = forbidding.cluster.address, forbidding.profile.name
    assert exit_code_of(["cluster", "--address", address]) == 0
    shown = capsys.readouterr()
    assert name in shown.out
    assert "if forced" in shown.out
    assert "7.5 points" in shown.err
    asked = ["generate", "--address", address, "--mode", "linked", "--max-tokens", "2", QUESTION]
    assert exit_code_of(asked) == 1
    assert name in capsys.readouterr().err
    assert exit_code_of([*asked, "--force-linked"]) == 0
    assert f"profile {name}: 2 link tokens per chunk; it forbids linked, which was forced" in capsys.readouterr().err


def test_another_models_profile_stops_the_start_by_name(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    path = folder / PROFILE_FILE
    save_profile(ReuseProfile("0" * 64, True, POLICY), path)
    with pytest.raises(NodeRefused, match="another model") as caught, LocalCluster(folder, log_dir=tmp_path / "logs"):
        pass
    assert str(path) in caught.value.message
