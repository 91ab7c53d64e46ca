"""What the doctor's own tenants stored is dropped again, from every store.

Forgetting by text does not reach it all: prefix and linked chunks have ids that nobody can name without the prompts. An
operator can list a tenant's chunks and drop them, and does so here for tenants that nobody but the doctor is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from spolia.cli.units import counted, human_bytes
from spolia.doctor.finding import Finding, State
from spolia.errors import SpoliaError
from spolia.store_admin import StoreAdmin
from spolia.store_results import Deleted

CHECK = "clean-up"
LOOK_S = 0.5
NUM_EMPTY_LOOKS = 3
"""Nodes store in the background: so many looks in a row must find nothing."""

PATIENCE_S = 15.0


def clean_up(stores: Sequence[str], tenants: Sequence[str], num_tokens: int, timeout_s: float) -> Finding:
    """Drops all that `tenants` have at `stores`, of `num_tokens` tokens at most; the finding says what stays."""
    dropped = Deleted()
    try:
        with StoreAdmin(stores, timeout_s=min(timeout_s, PATIENCE_S)) as admin:
            dropped, failed = _drop_all(admin, tenants)
    except SpoliaError as error:
        return stays(num_tokens, f"{type(error).__name__}: {error.message}", State.WARNING)
    facts = {"num_objects": dropped.num_objects, "num_bytes": dropped.num_bytes, "failed": sorted(failed)}
    went = f"{counted(dropped.num_objects, 'chunk')}, {human_bytes(dropped.num_bytes)}"
    said = f"dropped what the doctor's tenants had stored: {went}"
    if failed:
        reasons = "; ".join(f"{store}: {why}" for store, why in failed.items())
        return Finding(CHECK, State.WARNING, f"{said}; the rest stays until it ages out: {reasons}", facts)
    return Finding(CHECK, State.OK, said, facts)


def stays(num_tokens: int, why: str, state: State = State.SKIPPED) -> Finding:
    """The finding that nothing could be dropped."""
    said = f"KV of at most {num_tokens} tokens stays in the stores until it ages out; {why}"
    return Finding(CHECK, state, said, {"num_tokens": num_tokens})


def _drop_all(admin: StoreAdmin, tenants: Sequence[str]) -> tuple[Deleted, dict[str, str]]:
    """What went, and why not all did, by store."""
    dropped = Deleted()
    deadline_s = time.monotonic() + PATIENCE_S
    num_empty = 0
    while num_empty < NUM_EMPTY_LOOKS:
        listings = [admin.list_objects(tenant_id=tenant) for tenant in tenants]
        failed = {store: error.message for listing in listings for store, error in listing.failed.items()}
        found = [each for listing in listings for each in listing.objects]
        if found:
            deleted = admin.delete(found)
            dropped = sum(deleted.answers.values(), dropped)
            failed |= {store: error.message for store, error in deleted.failed.items()}
        if failed:
            return dropped, failed
        num_empty = 0 if found else num_empty + 1
        if time.monotonic() >= deadline_s:
            return dropped, {"all": f"chunks still came after {PATIENCE_S:g} s"}
        time.sleep(LOOK_S)
    return dropped, {}
