"""Whether a tenant can tell what another has stored: by a hit, or by the time its own request takes.

Two tenants, fresh documents in every round. The first tenant has one document, D, computed and stored. The second then
asks about D, and about another, E, that nobody knows, in random order: both must be computed for it. A hit on D is a
failure by itself. The times to first token of D and E make a pair; over all rounds their differences are put to
Wilcoxon's signed-rank test, exact, at one in a hundred. What a hit would have saved is measured beside it: the first
tenant asks about D too. Timing passes when the interval of the difference holds zero and excludes a saving as
large as a hit's, by the lower end of that one's interval. Where it excludes zero, the whole is done again with twice
the rounds, and fails when it does so again: chance alone does that to one run in ten thousand.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from spolia.client import Client
from spolia.doctor.finding import Finding, State
from spolia.doctor.signed_rank import SignedRank, signed_rank
from spolia.errors import InvalidRequest, SpoliaError
from spolia.parts import Document
from spolia.results import Model, Result
from spolia_core.reuse import ReuseMode

DOCUMENT_TOKENS = 512
QUESTION = "What is said above?"
QUESTION_TOKENS = 64
"""Room that question, template and answer are given in a context."""

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True, slots=True)
class Round:
    """Milliseconds to the first token, and tokens reused."""

    known_ms: float
    """The second tenant, about what the first has."""
    fresh_ms: float
    """The second tenant, about what nobody has."""
    hit_ms: float
    """The first tenant, about what it has."""
    num_known_reused: int
    num_fresh_reused: int
    num_hit_reused: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rounds of one mode amount to. Times in milliseconds; a positive shift means that D took longer."""

    rounds: tuple[Round, ...]
    difference: SignedRank
    saving: SignedRank
    """What a hit saves: E minus the first tenant's own D."""

    @property
    def num_leaked(self) -> int:
        """Tokens that the second tenant reused and cannot have known."""
        return sum(r.num_known_reused + r.num_fresh_reused for r in self.rounds)

    @property
    def sees_hits(self) -> bool:
        """Whether the first tenant got hits, and they show in its times: else no leak would show either."""
        return all(r.num_hit_reused for r in self.rounds) and self.saving.low > 0

    @property
    def excludes_a_hit(self) -> bool:
        """Whether a saving as small as a hit's may be lies outside the interval of the difference."""
        return self.difference.low > -self.saving.low


class Isolation:
    """Two tenants at one gateway, each by a client of its own, neither closed here."""

    def __init__(self, first: Client, second: Client, num_rounds: int, seed: int, say: Callable[[str], None]) -> None:
        self._first = first
        self._second = second
        self._num_rounds = num_rounds
        self._random = random.Random(seed)
        self._say = say
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that were computed for the check so far: at most so many can be stored, in whatever chunks."""
        return self._num_tokens

    def check(self, model: Model) -> list[Finding]:
        """One finding for each mode that the model serves. Raises what calls raise.

        Forgets its documents again, which leaves the chunks that came of whole prompts (`clean_up`).
        """
        num_words = self._num_words(model)
        return [self._check_mode(mode, num_words) for mode in model.modes]

    def _check_mode(self, mode: ReuseMode, num_words: int) -> Finding:
        verdict = self._run(mode, num_words, self._num_rounds)
        if verdict.num_leaked == 0 and verdict.difference.is_beyond_noise:
            verdict = self._run(mode, num_words, 2 * self._num_rounds)
        return finding_of(mode, verdict)

    def _run(self, mode: ReuseMode, num_words: int, num_rounds: int) -> Verdict:
        self._round(mode, num_words)  # first requests load and compile what later ones find ready
        rounds = []
        for number in range(num_rounds):
            self._say(f"isolation, {mode.name.lower()}: round {number + 1} of {num_rounds}")
            rounds.append(self._round(mode, num_words))
        return Verdict(
            tuple(rounds),
            signed_rank([r.known_ms - r.fresh_ms for r in rounds]),
            signed_rank([r.fresh_ms - r.hit_ms for r in rounds]),
        )

    def _round(self, mode: ReuseMode, num_words: int) -> Round:
        known, fresh = self._document(num_words), self._document(num_words)
        try:
            self._store(known, mode)
            order = [known, fresh] if self._random.random() < 0.5 else [fresh, known]
            second = {document: self._ask(self._second, document, mode) for document in order}
            hit = self._ask(self._first, known, mode)
        finally:
            for client in (self._first, self._second):
                with suppress(SpoliaError):  # it ages out
                    client.forget([known, fresh])
        return Round(
            second[known].ttft_ms,
            second[fresh].ttft_ms,
            hit.ttft_ms,
            second[known].reuse.num_reused_tokens,
            second[fresh].reuse.num_reused_tokens,
            hit.reuse.num_reused_tokens,
        )

    def _store(self, document: Document, mode: ReuseMode) -> None:
        if mode is ReuseMode.LINKED:
            self._num_tokens += sum(each.num_tokens for each in self._first.warm([document], splitter="document"))
        else:
            self._ask(self._first, document, mode)

    def _ask(self, client: Client, document: Document, mode: ReuseMode) -> Result:
        result = client.generate([document, QUESTION], mode=mode, max_tokens=1, splitter="document", ignore_eos=True)
        self._num_tokens += result.num_prompt_tokens - result.reuse.num_reused_tokens
        return result

    def _num_words(self, model: Model) -> int:
        """Words of a document of `DOCUMENT_TOKENS`, or of what a small context holds."""
        wanted = min(DOCUMENT_TOKENS, model.max_context_tokens - QUESTION_TOKENS)
        if wanted < QUESTION_TOKENS:
            raise InvalidRequest(
                f"{model.name} has a context of {model.max_context_tokens} tokens: no room for a check"
            )
        sample = self._document(100)
        per_word = len(self._first.tokenize(sample.text)) / 100
        return max(1, int(wanted / (per_word * 1.15)))  # other words may take a few tokens more

    def _document(self, num_words: int) -> Document:
        """Nonsense that nobody has asked about before."""
        return Document(" ".join(self._word() for _ in range(num_words)) + ".\n")

    def _word(self) -> str:
        draw = self._random.choice
        return "".join(draw(_CONSONANTS) + draw(_VOWELS) for _ in range(2))


def finding_of(mode: ReuseMode, verdict: Verdict) -> Finding:
    """A verdict in words."""
    difference, saving = verdict.difference, verdict.saving
    facts = {
        "mode": mode.name.lower(),
        "num_rounds": difference.num_pairs,
        "num_leaked_tokens": verdict.num_leaked,
        "difference_ms": round(difference.shift, 3),
        "difference_99_ms": [round(difference.low, 3), round(difference.high, 3)],
        "p_value": difference.p_value,
        "hit_saves_ms": round(saving.shift, 3),
        "hit_saves_99_ms": [round(saving.low, 3), round(saving.high, 3)],
        "num_hit_tokens": sum(r.num_hit_reused for r in verdict.rounds),
    }
    numbers = (
        f"known to another tenant − known to nobody: {difference.shift:+.1f} ms "
        f"[{difference.low:+.1f}, {difference.high:+.1f}], p {difference.p_value:.3f}, {difference.num_pairs} rounds; "
        f"a hit saves {saving.shift:.1f} ms"
    )
    name = f"isolation ({mode.name.lower()})"
    if verdict.num_leaked:
        said = f"a tenant reused {verdict.num_leaked} tokens of another's documents"
        return Finding(name, State.FAILED, said, facts)
    if difference.is_beyond_noise:
        return Finding(name, State.FAILED, f"no hit, but times tell: {numbers}", facts)
    if not verdict.sees_hits:
        said = f"no hit; own hits do not show in times here, so times prove nothing: {numbers}"
        return Finding(name, State.WARNING, said, facts)
    if not verdict.excludes_a_hit:
        said = f"no hit; too noisy to exclude a leak by time, try --rounds {2 * difference.num_pairs}: {numbers}"
        return Finding(name, State.WARNING, said, facts)
    return Finding(name, State.OK, f"no hit, no difference beyond noise: {numbers}", facts)
