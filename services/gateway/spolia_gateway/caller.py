"""Who asks, as far as the gateway's work needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from spolia_core.errors import Forbidden
from spolia_core.key_book import Role, TenantLimits


@dataclass(frozen=True, slots=True)
class Caller:
    """An identity that was checked. `key_id` is empty for one without a key."""

    tenant_id: str
    roles: frozenset[Role] = frozenset({Role.USER})
    limits: TenantLimits = field(default_factory=TenantLimits)
    key_id: str = ""

    def check_may(self, what: str, role: Role) -> None:
        """Raises `Forbidden` unless it has `role`. An operator may do all that a user may."""
        if role not in self.roles and Role.OPERATOR not in self.roles:
            raise Forbidden(
                f"{what} needs a key with the role {role.value}",
                field="authorization",
                limit=role.value,
                actual=", ".join(sorted(known.value for known in self.roles)),
            )
