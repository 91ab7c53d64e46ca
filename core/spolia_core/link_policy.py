"""What LINKED recomputes of reused chunks, and how they are compiled; known by a short name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spolia_core.field_checks import check_field, wrong_field
from spolia_core.reuse import DEFAULT_LINK_TOKENS

MAX_LINK_TOKENS = 1 << 20
MAX_SINK_TOKENS = 1 << 10
_POLICY = re.compile(
    r"link:(?P<link>[0-9]{1,7})|sinks:(?P<sinks>[1-9][0-9]{0,6})(\+link:(?P<behind>[0-9]{1,7}))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """What LINKED recomputes, and how local chunks are compiled.

    `num_link_tokens`: k, tokens recomputed in place at the head of each reused chunk (EPIC, AttnLink / LegoLink).
    `num_sink_tokens`: s, dummy tokens before a local chunk while it is compiled, then dropped (EPIC, LegoLink-0); part
    of the recipe, and so of every chunk id. Raises `InvalidRequest` for counts out of range.
    """

    num_link_tokens: int = DEFAULT_LINK_TOKENS
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        for name, most in (("num_link_tokens", MAX_LINK_TOKENS), ("num_sink_tokens", MAX_SINK_TOKENS)):
            value = getattr(self, name)
            check_field(type(value) is int and 0 <= value <= most, name, f"a whole number, 0 … {most}", value)

    @property
    def name(self) -> str:
        """ "link:16", "naive" (k = 0, no sinks), "sinks:4" (k = 0), "sinks:4+link:8"."""
        sinks = [f"sinks:{self.num_sink_tokens}"] if self.num_sink_tokens else []
        link = [f"link:{self.num_link_tokens}"] if self.num_link_tokens else []
        return "+".join(sinks + link) or "naive"

    @classmethod
    def parse(cls, name: str) -> LinkPolicy:
        """The policy of this name; "link:0" is "naive". Raises `InvalidRequest` for anything else."""
        if name == "naive":
            return cls(0, 0)
        match = _POLICY.fullmatch(name)
        if match is None:
            raise wrong_field("policy", "naive, link:K, sinks:S or sinks:S+link:K", name)
        return cls(int(match["link"] or match["behind"] or 0), int(match["sinks"] or 0))
