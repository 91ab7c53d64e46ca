"""The profile in one process: an engine serves LINKED on the terms of its model's profile, as every node does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_worlds import BOS, adapter_of, assert_nothing_held, letters, model_of, tokens
from tokenizers import Tokenizer, models

from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.link_policy import LinkPolicy
from spolia_core.link_terms import LinkTerms
from spolia_core.profile import PROFILE_FILE, PolicyLoss, ReuseProfile, save_profile
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_engine.engine import Completion, Engine

pytestmark = pytest.mark.usefixtures("place")

POLICY = LinkPolicy(num_link_tokens=7, num_sink_tokens=3)
LOSS = PolicyLoss(POLICY.name, 0.25, 7.5, 0.05)
LINKED = ReuseMode.LINKED


def profile_of(*, allows_linked: bool = True) -> ReuseProfile:
    return ReuseProfile(adapter_of("llama-bos").fingerprint.hex(), allows_linked, POLICY, measured=(LOSS,))


def engine_with(profile: ReuseProfile | None, num_sink_tokens: int | None = None) -> Engine:
    adapter = adapter_of("llama-bos")
    return Engine.of(adapter, letters, pool_bytes=1 << 22, num_sink_tokens=num_sink_tokens, profile=profile)


def documents(engine: Engine) -> Prompt:
    first, second = engine.chunk(tokens(60, 1)), engine.chunk(tokens(40, 2))
    return Prompt((Part((BOS,)), first, second, Part((1, 2, 3))))


def ask(engine: Engine, mode: ReuseMode = LINKED, k: int | None = None, *, force_linked: bool = False) -> Completion:
    params = SamplingParams(max_tokens=6)
    answer = engine.generate(documents(engine), params, mode=mode, num_link_tokens=k, force_linked=force_linked)
    assert_nothing_held(engine)
    return answer


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model_of("llama-bos").save_pretrained(tmp_path)
    Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0")).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_profile_beside_the_model_gives_link_tokens_sinks_and_its_name(model_dir: Path) -> None:
    profile = profile_of()
    save_profile(profile, model_dir / PROFILE_FILE)
    engine = Engine.load(model_dir, pool_bytes=1 << 22)
    assert engine.profile == profile
    answer = ask(engine)
    report = answer.reuse
    assert (report.profile, report.link_tokens_per_chunk, report.sink_tokens_per_chunk) == (profile.name, 7, 3)
    assert (report.sources[TokenSource.LINK], report.forced) == (2 * 7, False)
    by_hand = ask(engine_with(None, num_sink_tokens=3), k=7)
    assert (answer.token_ids, report.sources) == (by_hand.token_ids, by_hand.reuse.sources)


def test_without_a_profile_answers_say_default_and_sixteen(model_dir: Path) -> None:
    engine = Engine.load(model_dir, pool_bytes=1 << 22)
    assert engine.profile is None
    linked = ask(engine).reuse
    assert (linked.profile, linked.link_tokens_per_chunk, linked.sink_tokens_per_chunk) == ("default", 16, 0)
    assert not ask(engine, force_linked=True).reuse.forced, "nothing forbade it"


def test_another_models_profile_is_refused_not_passed_over(model_dir: Path) -> None:
    save_profile(replace(profile_of(), fingerprint="0" * 64), model_dir / PROFILE_FILE)
    with pytest.raises(InvalidRequest, match="another model") as caught:
        Engine.load(model_dir, pool_bytes=1 << 22)
    assert caught.value.field == "fingerprint"


def test_a_profile_that_forbids_linked_is_obeyed_with_the_nodes_words(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = profile_of(allows_linked=False)
    engine = engine_with(profile)
    with pytest.raises(NotSupported) as expected:
        LinkTerms.of(profile).check(force_linked=False)
    with monkeypatch.context() as patched:
        patched.setattr(engine.pool, "allocate", lambda *_, **__: pytest.fail("memory was taken"))
        with pytest.raises(NotSupported) as caught:
            ask(engine)
    error, its = caught.value, expected.value
    assert (error.message, error.field, error.limit) == (its.message, its.field, its.limit)
    assert "7.5 points" in error.message
    exact = ask(engine, ReuseMode.EXACT, force_linked=True).reuse
    assert (exact.profile, exact.link_tokens_per_chunk, exact.sink_tokens_per_chunk) == (profile.name, 0, 0)
    assert not exact.forced
    forced = ask(engine, force_linked=True).reuse
    assert (forced.profile, forced.link_tokens_per_chunk, forced.forced) == (profile.name, 7, True)


@pytest.mark.parametrize("k", [0, 7, 9])
def test_link_tokens_set_by_hand_take_the_place_of_the_profile_but_for_its_sinks(k: int) -> None:
    report = ask(engine_with(profile_of(allows_linked=False)), k=k).reuse
    assert (report.profile, report.link_tokens_per_chunk, report.sink_tokens_per_chunk) == ("manual", k, 3)
    assert (report.sources[TokenSource.LINK], report.forced) == (2 * k, False)


@pytest.mark.parametrize("minimum", [0, 15, 16, 17])
def test_reusing_shorter_documents_than_were_calibrated_is_not_called_by_the_profile(minimum: int) -> None:
    profile, params = profile_of(), SamplingParams(max_tokens=1)
    engine = engine_with(profile)
    report = engine.generate(documents(engine), params, mode=LINKED, min_reused_tokens=minimum).reuse
    assert (report.profile, report.link_tokens_per_chunk) == (profile.name if minimum >= 16 else "manual", 7)
    forbidding = engine_with(profile_of(allows_linked=False))
    with pytest.raises(NotSupported):
        forbidding.generate(documents(forbidding), params, mode=LINKED, min_reused_tokens=minimum)


@pytest.mark.parametrize("num_sink_tokens", [0, 3, 5])
def test_sinks_set_by_hand_are_the_recipe_and_no_profile_vouches_for_others_than_its_own(num_sink_tokens: int) -> None:
    profile = profile_of(allows_linked=False)
    engine = engine_with(profile, num_sink_tokens)
    assert engine.recipe.num_sink_tokens == num_sink_tokens
    report = ask(engine, force_linked=True).reuse
    is_its_own = num_sink_tokens == POLICY.num_sink_tokens
    assert (report.profile, report.forced) == ((profile.name, True) if is_its_own else ("manual", False))
    assert (report.link_tokens_per_chunk, report.sink_tokens_per_chunk) == (7, num_sink_tokens)
