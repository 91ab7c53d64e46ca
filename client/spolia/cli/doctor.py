"""`spolia doctor`: is this cluster well, and are its tenants apart?"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from spolia.cli.options import DEFAULT_ADDRESS, Address, Json, Timeout
from spolia.cli.output import notes, print_columns, print_json
from spolia.client import Client
from spolia.connection import TLS_DIR_ENV, Door, open_door
from spolia.doctor import cluster_checks, door_checks
from spolia.doctor.clean_up import clean_up, stays
from spolia.doctor.finding import Finding, State
from spolia.doctor.isolation import Isolation
from spolia.doctor.signed_rank import MIN_PAIRS
from spolia.errors import SpoliaError, Unauthenticated
from spolia.results import Cluster, Model
from spolia_core.key_book import Role, new_key
from spolia_core.key_place import key_place

TENANTS = ("spolia-doctor-a", "spolia-doctor-b")
OPERATOR_TENANT = "spolia-doctor"
KEY_PATIENCE_S = 10.0
"""A gateway looks at its keys every second."""

FAILED = 1


def doctor(
    address: Address = DEFAULT_ADDRESS,
    keys: Annotated[
        str,
        typer.Option(
            "--keys",
            envvar="SPOLIA_KEYS",
            help="Where the gateway's API keys are: the doctor makes three for itself and withdraws them at the end.",
        ),
    ] = "",
    other_key: Annotated[
        str,
        typer.Option(
            "--other-api-key",
            envvar="SPOLIA_OTHER_API_KEY",
            help="In place of --keys: a key of another tenant than SPOLIA_API_KEY's, to prove isolation with.",
        ),
    ] = "",
    rounds: Annotated[int, typer.Option(min=MIN_PAIRS, max=1000, help="Rounds of the isolation check.")] = 16,
    seed: Annotated[int | None, typer.Option(help="Of the documents it makes up; default: a new one.")] = None,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Check a running cluster: reachable, whole, of one release, on time, behind TLS and keys, and tenants apart.

    Isolation is proved with two tenants and one document: no hit for the second, and no difference in its time to first
    token beyond noise (Wilcoxon's signed-rank test at 1 in 100, repeated before it fails). Ends with 1 when a check
    failed.
    """
    door = open_door(address, None, None, None)
    seed = secrets.randbits(32) if seed is None else seed
    with notes().status("looking") as status, _visitors(door, keys, other_key, timeout) as clients:
        own = TENANTS if keys else ()
        findings = _findings(door, clients, own, rounds, seed, timeout, status.update)
    _report(findings, seed, as_json=as_json)
    if any(finding.state is State.FAILED for finding in findings):
        raise typer.Exit(FAILED)


def _findings(
    door: Door,
    clients: Sequence[Client],
    own_tenants: Sequence[str],
    rounds: int,
    seed: int,
    timeout_s: float,
    say: Callable[[str], None],
) -> list[Finding]:
    """`own_tenants` are those of the clients where nobody else is of them."""
    operator, *tenants = clients
    reached, models = cluster_checks.reach(operator)
    seen, cluster = cluster_checks.look_at(operator)
    findings = [
        reached,
        *seen,
        door_checks.gateway_tls(door),
        door_checks.keys_are_asked_for(door, timeout_s),
        door_checks.nodes_ask_for_certificates(cluster, os.environ.get(TLS_DIR_ENV, "")),
    ]
    if not models:
        return findings
    has_keys = all(found.state is State.OK for found in findings if found.check == "keys")
    if not tenants:
        said = "needs two tenants: --keys, or SPOLIA_API_KEY and --other-api-key"
        return [*findings, Finding("isolation", State.SKIPPED, said)]
    if not has_keys:
        said = "the gateway knows one tenant only; give it keys"
        return [*findings, Finding("isolation", State.SKIPPED, said)]
    first, second = tenants
    isolation = Isolation(first, second, rounds, seed, say)

    def cleaned() -> Finding:
        say("dropping what was stored")
        return _clean_up(isolation, own_tenants, cluster, timeout_s)

    try:
        apart = _isolation(isolation, models[0])
    except BaseException:
        notes().print(f"clean-up: {cleaned().said}", markup=False)
        raise
    return [*findings, *apart, cleaned()]


def _clean_up(isolation: Isolation, tenants: Sequence[str], cluster: Cluster | None, timeout_s: float) -> Finding:
    if not tenants:
        said = "the tenants are not the doctor's: with --keys it makes its own, and drops what they stored"
        return stays(isolation.num_tokens, said)
    stores = [node.address for node in cluster.nodes if node.role == "kvstore"] if cluster is not None else []
    if not stores:
        return stays(isolation.num_tokens, "the gateway names no store", State.WARNING)
    return clean_up(stores, tenants, isolation.num_tokens, timeout_s)


def _isolation(isolation: Isolation, model: Model) -> list[Finding]:
    try:
        return isolation.check(model)
    except SpoliaError as error:
        return [Finding("isolation", State.FAILED, f"could not be checked: {type(error).__name__}: {error.message}")]


@contextmanager
def _visitors(door: Door, keys: str, other_key: str, timeout_s: float) -> Iterator[list[Client]]:
    """Clients: who looks around, then the two tenants, where there are two."""
    with _keys_of(door, keys, other_key) as shown:
        clients = [Client(door.address, api_key=key, timeout_s=timeout_s, retry_s=0) for key in shown]
        try:
            if keys:
                for client in clients:
                    _wait_until_known(client)
            yield clients
        finally:
            for client in clients:
                client.close()


@contextmanager
def _keys_of(door: Door, keys: str, other_key: str) -> Iterator[list[str]]:
    if not keys:
        yield [door.api_key] + ([door.api_key, other_key] if other_key else [])
        return
    place = key_place(keys)
    made = [new_key(OPERATOR_TENANT, frozenset({Role.OPERATOR}), name="spolia doctor")]
    made += [new_key(tenant, name="spolia doctor") for tenant in TENANTS]
    try:
        for _, record in made:
            place.change(lambda book, record=record: book.with_key(record))  # type: ignore[misc]  # bound now
        yield [key for key, _ in made]
    finally:
        ids = {record.key_id for _, record in made}
        place.change(lambda book: book.only(lambda record: record.key_id not in ids))


def _wait_until_known(client: Client) -> None:
    deadline_s = time.monotonic() + KEY_PATIENCE_S
    while True:
        try:
            client.models()
        except Unauthenticated:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(0.2)  # the gateway offers no word of it
        else:
            return


def _report(findings: Sequence[Finding], seed: int, *, as_json: bool) -> None:
    if as_json:
        print_json({"findings": list(findings), "seed": seed})
        return
    print_columns(*[(finding.state.value, finding.check, finding.said) for finding in findings])
