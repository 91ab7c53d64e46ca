"""How long leases may be, as the contract says. The client, which imports none of this, has the same for pins."""

from __future__ import annotations

MAX_CLAIM_TTL_MS = 600_000
MAX_PIN_LEASE_MS = 3_600_000

MAX_LEFT_S = max(MAX_CLAIM_TTL_MS, MAX_PIN_LEASE_MS) / 1000
"""What a lease found at start can have left: a clock that was set back must not make it endless."""
