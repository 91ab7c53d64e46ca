"""A node serves LINKED as its model's profile says, refuses what that forbids, and says so in every answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from tiny_answers import ask, assert_same, generate_request, resume, send
from tiny_cluster import Parts, World, a_world, count_calls, doc, prompt_of, tokens

from spolia.v1.prefill_pb2 import PrefillStart
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.profile import PROFILE_FILE, LinkPolicy, PolicyLoss, ReuseProfile, profile_path, save_profile
from spolia_core.reuse import ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_decode.config import DecodeConfig
from spolia_decode.node import DecodeNode
from spolia_engine.engine import Completion, Engine
from spolia_prefill.work import check_start
from spolia_worker.loading import load_engine

GREEDY = SamplingParams(max_tokens=12)
LINKED = ReuseMode.LINKED
LINK, COMPILED, DEVICE, HOST = TokenSource.LINK, TokenSource.COMPILED, TokenSource.DEVICE, TokenSource.HOST
PARTS: Parts = [tokens(3), doc(70, 1), doc(60, 2), tokens(9, 3)]
BOS = 3


def fingerprint_of(model: Path) -> str:
    return Engine.load(model, pool_bytes=1 << 20).adapter.fingerprint.hex()


def profile_of(model: Path, policy: LinkPolicy, *, allows_linked: bool = True) -> ReuseProfile:
    """A calibration of the model, as if one had been run."""
    return ReuseProfile(
        fingerprint_of(model), allows_linked, policy, measured=(PolicyLoss(policy.name, 0.25, 7.5, 0.1),)
    )


def kept(profile: ReuseProfile, folder: Path) -> Path:
    """The profile directory that holds it."""
    save_profile(profile, profile_path(folder, profile.fingerprint))
    return folder


@pytest.fixture(scope="session")
def model_with_bos(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a begin-of-sequence token, which dummy sinks are made of."""
    folder = tmp_path_factory.mktemp("with-bos") / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": BOS}))
    return folder


@pytest_asyncio.fixture
async def world_with_bos(model_with_bos: Path) -> AsyncIterator[World]:
    async with a_world(model_with_bos) as made:
        yield made


async def test_without_a_profile_answers_say_default_and_sixteen(world: World) -> None:
    decode = await world.decode()
    linked = (await ask(decode, PARTS, GREEDY, LINKED)).report
    assert (linked.profile, linked.link_tokens_per_chunk, linked.sink_tokens_per_chunk) == ("default", 16, 0)
    assert linked.sources[LINK] == 2 * 16
    forced = (await ask(decode, PARTS, GREEDY, LINKED, force_linked=True)).report
    assert not linked.forced
    assert not forced.forced, "nothing forbade it"
    exact = (await ask(decode, [tokens(20)], GREEDY)).report
    assert (exact.profile, exact.link_tokens_per_chunk, exact.forced) == ("default", 0, False)


@pytest.mark.parametrize("k", [0, 4, 33])
async def test_a_profile_sets_the_link_tokens(world: World, model: Path, tmp_path: Path, k: int) -> None:
    profile = profile_of(model, LinkPolicy(k))
    await world.store()
    await world.prefill(profile_dir=kept(profile, tmp_path))
    decode = await world.decode(profile_dir=tmp_path)
    answer = await ask(decode, PARTS, GREEDY, LINKED)
    assert_same(answer, world.expect(PARTS, GREEDY, LINKED, link_tokens=k))
    assert (answer.report.profile, answer.report.link_tokens_per_chunk) == (profile.name, k)
    assert answer.sources.get(LINK, 0) == 2 * k
    assert answer.sources[COMPILED] == 130 - 2 * k


async def test_a_profile_beside_the_model_is_found(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    profile = profile_of(model, LinkPolicy(5))
    save_profile(profile, folder / PROFILE_FILE)
    async with a_world(folder) as world:
        decode = await world.decode()
        report = (await ask(decode, PARTS, GREEDY, LINKED)).report
        assert (report.profile, report.link_tokens_per_chunk) == (profile.name, 5)


@pytest.mark.parametrize("allows_linked", [True, False])
async def test_link_tokens_set_by_hand_override_the_profile(
    world: World, model: Path, tmp_path: Path, allows_linked: bool
) -> None:
    profile = profile_of(model, LinkPolicy(4), allows_linked=allows_linked)
    decode = await world.decode(profile_dir=kept(profile, tmp_path), link_tokens=7)
    report = (await ask(decode, PARTS, GREEDY, LINKED)).report
    assert (report.profile, report.link_tokens_per_chunk, report.forced) == ("manual", 7, False)
    assert report.sources[LINK] == 2 * 7


@pytest.mark.parametrize(("minimum", "num_reused"), [(0, 12 + 11), (15, 0), (16, 0), (17, 0)])
async def test_reusing_shorter_documents_than_were_calibrated_is_not_called_by_the_profile(
    world: World, model: Path, tmp_path: Path, minimum: int, num_reused: int
) -> None:
    profile = profile_of(model, LinkPolicy(4))
    decode = await world.decode(profile_dir=kept(profile, tmp_path), min_reused_tokens=minimum)
    report = (await ask(decode, [tokens(3), doc(16, 1), doc(15, 2), tokens(9, 3)], GREEDY, LINKED)).report
    assert (report.profile, report.link_tokens_per_chunk) == (profile.name if minimum >= 16 else "manual", 4)
    assert report.sources[COMPILED] == num_reused
    assert decode.record().model.profile == report.profile


async def test_reusing_shorter_documents_does_not_override_a_refusal(world: World, model: Path, tmp_path: Path) -> None:
    profile = profile_of(model, LinkPolicy(4), allows_linked=False)
    decode = await world.decode(profile_dir=kept(profile, tmp_path), min_reused_tokens=0)
    with pytest.raises(NotSupported) as caught:
        await ask(decode, PARTS, GREEDY, LINKED)
    assert caught.value.field == "profile"


async def test_a_forbidding_profile_refuses_before_memory_is_held(
    world: World, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profile_of(model, LinkPolicy(8), allows_linked=False)
    decode = await world.decode(profile_dir=kept(profile, tmp_path))
    allocated = count_calls(monkeypatch, decode.engine.pool, "allocate")
    with pytest.raises(NotSupported) as caught:
        await ask(decode, PARTS, GREEDY, LINKED)
    assert caught.value.field == "profile"
    assert all(word in caught.value.message for word in (profile.name, "0.25 nats", "7.5 points", "force_linked"))
    assert not allocated
    exact = [tokens(150)]
    assert_same(await ask(decode, exact, GREEDY), world.expect(exact, GREEDY))
    assert allocated


async def test_force_linked_serves_and_says_which_profile_it_broke(world: World, model: Path, tmp_path: Path) -> None:
    profile = profile_of(model, LinkPolicy(8), allows_linked=False)
    decode = await world.decode(profile_dir=kept(profile, tmp_path))
    answer = await ask(decode, PARTS, GREEDY, LINKED, force_linked=True)
    assert_same(answer, world.expect(PARTS, GREEDY, LINKED, link_tokens=8))
    assert (answer.report.forced, answer.report.profile, answer.report.link_tokens_per_chunk) == (True, profile.name, 8)
    exact = (await ask(decode, PARTS[:1], GREEDY, force_linked=True)).report
    assert not exact.forced, "EXACT breaks no bound"


async def test_replays_say_the_same(world: World, model: Path, tmp_path: Path) -> None:
    profile = profile_of(model, LinkPolicy(4), allows_linked=False)
    decode = await world.decode(profile_dir=kept(profile, tmp_path))
    request = generate_request(decode, PARTS, GREEDY, LINKED, force_linked=True)
    whole = await send(decode, request)
    said = (profile.name, 4, True)
    for num_seen in (1, 6, len(whole.token_ids)):  # the last has nothing left to read or to draw
        report = (await resume(decode, request, whole.token_ids[:num_seen])).report
        assert (report.profile, report.link_tokens_per_chunk, report.forced) == said
    request.force_linked = False
    with pytest.raises(NotSupported):
        await resume(decode, request, whole.token_ids[:6])


async def test_the_directory_hears_the_profile_and_why_linked_is_refused(
    world: World, model: Path, tmp_path: Path
) -> None:
    profile = profile_of(model, LinkPolicy(8), allows_linked=False)
    folder = kept(profile, tmp_path)
    plain, forbidding = await world.decode(), await world.decode(profile_dir=folder)
    manual, prefill = await world.decode(profile_dir=folder, link_tokens=3), await world.prefill(profile_dir=folder)
    said = [
        (m.profile, m.policy, m.supports_linked, m.linked_refusal)
        for m in (node.record().model for node in (plain, forbidding, manual, prefill))
    ]
    assert said == [
        ("default", "link:16", True, ""),
        (profile.name, "link:8", True, profile.why_forbidden()),
        ("manual", "link:3", True, ""),
        (profile.name, "link:8", True, profile.why_forbidden()),
    ]


def linked_behind_sinks(model: Path, num_sink_tokens: int, k: int, parts: Parts = PARTS) -> Completion:
    """What a single process with the same recipe answers."""
    engine = Engine.load(model, pool_bytes=16 << 20, num_sink_tokens=num_sink_tokens)
    return engine.generate(prompt_of(parts, engine.ids), GREEDY, mode=LINKED, num_link_tokens=k)


@pytest.mark.parametrize("k", [0, 2])
async def test_chunks_behind_sinks_are_the_same_on_every_node(
    world_with_bos: World, model_with_bos: Path, tmp_path: Path, k: int
) -> None:
    world, profile = world_with_bos, profile_of(model_with_bos, LinkPolicy(k, num_sink_tokens=4))
    folder = kept(profile, tmp_path)
    await world.store()
    prefill = await world.prefill(profile_dir=folder)
    decode, other = await world.decode(profile_dir=folder), await world.decode(profile_dir=folder)
    expected = linked_behind_sinks(model_with_bos, 4, k)
    cold = await ask(decode, PARTS, GREEDY, LINKED)
    assert_same(cold, expected)
    assert prefill.config.node_id in cold.report.nodes
    assert cold.sources[COMPILED] == 130 - 2 * k
    assert cold.report.sink_tokens_per_chunk == 4
    fetched = await ask(other, PARTS, GREEDY, LINKED)
    assert_same(fetched, expected)
    assert fetched.sources[HOST] == 130 - 2 * k
    assert [node.record().model.num_sink_tokens for node in (prefill, decode)] == [4, 4]
    without = linked_behind_sinks(model_with_bos, 0, k)
    assert without.token_ids != expected.token_ids, "choose another prompt: sinks change nothing here"


async def test_behind_sinks_a_document_that_begins_the_prompt_is_linked_too(
    world_with_bos: World, model_with_bos: Path, tmp_path: Path
) -> None:
    profile = profile_of(model_with_bos, LinkPolicy(5, num_sink_tokens=4))
    decode = await world_with_bos.decode(profile_dir=kept(profile, tmp_path))
    parts = [doc(70, 1), tokens(9, 3)]
    answer = await ask(decode, parts, GREEDY, LINKED)
    assert_same(answer, linked_behind_sinks(model_with_bos, 4, 5, parts))
    assert answer.sources[LINK] == 5, "its sinks do not stand before it here"


async def test_a_prefill_node_of_another_recipe_is_not_asked(
    world_with_bos: World, model_with_bos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, profile = world_with_bos, profile_of(model_with_bos, LinkPolicy(2, num_sink_tokens=4))
    await world.store()
    await world.prefill()
    decode = await world.decode(profile_dir=kept(profile, tmp_path))
    asked = count_calls(monkeypatch, decode.parts.prefill, "compile")
    answer = await ask(decode, PARTS, GREEDY, LINKED)
    assert_same(answer, linked_behind_sinks(model_with_bos, 4, 2))
    assert answer.report.nodes == [decode.config.node_id]
    assert not asked


async def test_ids_of_another_recipe_are_refused_by_name(
    world_with_bos: World, model_with_bos: Path, tmp_path: Path
) -> None:
    profile = profile_of(model_with_bos, LinkPolicy(2, num_sink_tokens=4))
    decode = await world_with_bos.decode(profile_dir=kept(profile, tmp_path))
    for mode in ReuseMode:
        with pytest.raises(NotSupported) as caught:
            await ask(decode, PARTS if mode is LINKED else [tokens(9)], GREEDY, mode, num_sink_tokens=0)
        assert (caught.value.field, caught.value.limit) == ("recipe", "4 sink tokens")
    start = PrefillStart(tenant_id="t", fingerprint=decode.engine.adapter.fingerprint, num_sink_tokens=3)
    with pytest.raises(NotSupported) as caught:
        check_start(start, decode.engine, bytes(32))
    assert (caught.value.field, caught.value.actual) == ("recipe", "3 sink tokens")


def test_sinks_of_a_model_without_a_bos_token_stop_the_start(model: Path, tmp_path: Path) -> None:
    profile = profile_of(model, LinkPolicy(2, num_sink_tokens=4))
    config = DecodeConfig(model=str(model), profile_dir=kept(profile, tmp_path))
    with pytest.raises(NotSupported, match="bos_token_id"):
        load_engine(config)


def test_a_profile_of_another_model_stops_the_start(model: Path, tmp_path: Path) -> None:
    profile = profile_of(model, LinkPolicy(2))
    path = profile_path(tmp_path, profile.fingerprint)
    save_profile(replace(profile, fingerprint="0" * 64), path)
    with pytest.raises(InvalidRequest, match="another model") as caught:
        load_engine(DecodeConfig(model=str(model), profile_dir=tmp_path))
    assert (caught.value.field, caught.value.actual) == ("fingerprint", "0" * 64)
    assert str(path) in caught.value.message


def test_a_recipe_that_changes_while_a_node_starts_stops_the_start(model_with_bos: Path, tmp_path: Path) -> None:
    profile = profile_of(model_with_bos, LinkPolicy(2, num_sink_tokens=4))
    config = DecodeConfig(model=str(model_with_bos), profile_dir=tmp_path, log_level="error")
    engine = load_engine(config)  # there is no profile yet
    kept(profile, tmp_path)
    with pytest.raises(InvalidRequest, match="start the node again") as caught:
        DecodeNode(config, engine)
    assert caught.value.field == "profile"
