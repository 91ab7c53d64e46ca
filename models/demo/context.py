"""One sequence of parts and which of its tokens see which: an exact picture of reused documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor


class Role(IntEnum):
    """What a token may see. Everything else is causal."""

    LIVE = 0  # all live tokens, and reused documents past their link tokens
    REUSED = 1  # its own document only, as if computed alone
    APART = 2  # as LIVE, but not seen from other parts


@dataclass(slots=True)
class Context:
    """Tokens with their positions, parts and roles, in the order of the parts.

    A reused document is laid out twice: its first `link` tokens live, then all of it computed alone, of which
    others see what follows the link tokens. Rotary scores depend on differences of positions only, so this is
    exactly the reuse of KV that was computed at local positions.
    """

    link: int = 0
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    local: list[int] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)

    def append(self, part: int, ids: Sequence[int], position: int, role: Role = Role.LIVE) -> int:
        """Adds a part that starts at `position`; returns the place of its first token."""
        start = len(self.ids)
        self.ids.extend(ids)
        self.positions.extend(range(position, position + len(ids)))
        self.parts.extend([part] * len(ids))
        self.local.extend(range(len(ids)))
        self.roles.extend([role] * len(ids))
        return start

    def append_reused(self, part: int, ids: Sequence[int], position: int) -> int:
        """Adds a document as reuse does; returns the place of the first token of what was computed alone."""
        self.append(part, ids[: self.link], position)
        return self.append(part, ids, position, Role.REUSED)

    def mask(self, tokens: int) -> Tensor:
        """Bool [tokens, tokens], true where the row's token sees the column's."""
        parts, local, roles = (torch.zeros(tokens, dtype=torch.long) for _ in range(3))
        for target, values in ((parts, self.parts), (local, self.local), (roles, self.roles)):
            target[: len(values)] = torch.tensor(values)
        same = parts[:, None] == parts[None]
        reused = roles == Role.REUSED
        from_live = (~reused | (local >= self.link))[None] & (same | (roles != Role.APART)[None])
        seen = torch.where(reused[:, None], same & reused[None], from_live)
        return seen & torch.ones(tokens, tokens, dtype=torch.bool).tril()
