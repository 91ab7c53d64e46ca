"""On what terms a node serves LINKED: its model's profile, its operator's word, or the default."""

from __future__ import annotations

from dataclasses import dataclass, field

from spolia_core.errors import NotSupported
from spolia_core.link_policy import LinkPolicy
from spolia_core.profile import DEFAULT_PROFILE, MANUAL_PROFILE, ReuseProfile


@dataclass(frozen=True, slots=True)
class LinkTerms:
    """What every LINKED answer of a node rests on. `refusal` says why it takes force; empty where it does not."""

    profile: str = DEFAULT_PROFILE
    policy: LinkPolicy = field(default_factory=LinkPolicy)
    refusal: str = ""

    @classmethod
    def of(cls, profile: ReuseProfile | None, num_link_tokens: int | None = None) -> LinkTerms:
        """The terms of a model's profile, else the default; `num_link_tokens` is what the operator set by hand, if any.

        A number set by hand takes the place of the profile, its refusal included: nothing was measured for it, and the
        name "manual" says so. Sink tokens stay the profile's, because all nodes of a cluster must agree on them.
        """
        terms = cls() if profile is None else cls(profile.name, profile.policy, profile.why_forbidden())
        if num_link_tokens is None:
            return terms
        return cls(MANUAL_PROFILE, LinkPolicy(num_link_tokens, terms.policy.num_sink_tokens))

    def check(self, *, force_linked: bool) -> bool:
        """Whether LINKED is served against the profile. Raises `NotSupported` where that would take force."""
        if self.refusal and not force_linked:
            raise linked_forbidden(self.profile, self.refusal)
        return bool(self.refusal)


def linked_forbidden(profile: str, refusal: str) -> NotSupported:
    """The error for LINKED against the word of `profile`, with the figures (`refusal`) and the ways out."""
    return NotSupported(
        f"profile {profile} forbids LINKED: {refusal}; use EXACT, or force_linked to take the loss",
        field="profile",
        limit="EXACT, or force_linked",
        actual=profile,
    )
