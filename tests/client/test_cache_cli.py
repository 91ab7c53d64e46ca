"""Laws of `spolia cache`, against stores made of dicts."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_runs import NOWHERE, Stores, rows
from cli_runs import Spolia
from fake_gateway import FakeGateway
from fake_store import DISK, FINGERPRINT, RAM, chunk_id

from spolia import errors
from spolia.cli.cache import forget, gc, ls, rm, stat_stores
from spolia.cli.units import counted, human_bytes, human_seconds, parse_duration
from spolia.v1 import directory_pb2, kvstore_pb2


def test_ls_shows_an_object_at_several_stores_in_one_line(cache: Spolia, stores: Stores) -> None:
    stores[0].put("abcd12", tiers=[DISK], age_s=200, pins={"a": 1000})
    stores[1].put("abcd12", tiers=[RAM], data=b"x" * 1536)
    (line,) = rows(cache("ls"))
    at = f"{stores[0].address},{stores[1].address}"
    assert line.split() == f"acme abcd12000000 local 48 1.5 KiB ram,disk {at} 2h 1m 6 1 served {'fe' * 6}".split()


def test_ls_of_empty_stores_says_so(cache: Spolia) -> None:
    done = cache("ls")
    assert (done.code, done.out, done.err) == (0, "no objects\n", "")


def test_ls_names_what_is_never_served(cache: Spolia, stores: Stores) -> None:
    stores[0].put("aa", state=kvstore_pb2.OBJECT_STATE_UNKNOWN_CODEC)
    stores[0].put("bb", state=kvstore_pb2.OBJECT_STATE_UNKNOWN_FORMAT)
    stores[0].put("cc", state=kvstore_pb2.OBJECT_STATE_UNKNOWN_FINGERPRINT)
    listed = rows(cache("ls"))
    assert [state in line for line, state in zip(listed, ("codec", "format", "fingerprint"), strict=True)] == [True] * 3


def test_ls_as_json_has_plain_numbers_and_full_ids(cache: Spolia, stores: Stores) -> None:
    stores[0].put("abcd", pins={"a": 1500})
    answer = cache("ls", "--json").json
    (found,) = answer["objects"]
    assert (found["tenant_id"], found["chunk_id"], found["kind"]) == ("acme", chunk_id("abcd").hex(), "local")
    assert (found["size_bytes"], found["age_s"], found["idle_s"], found["hits"]) == (250, 7200.0, 60.0, 3)
    assert (found["tiers"], found["stores"], found["state"]) == (["ram"], [stores[0].address], "served")
    assert (found["fingerprint"], found["pins"]) == (FINGERPRINT.hex(), [{"owner": "a", "remaining_s": 1.5}])
    assert found["replicas"][0]["compute_s"] == 0.25
    assert answer["failed"] == []


@pytest.mark.parametrize(("order", "expected"), [("age", "ba"), ("idle", "cb"), ("size", "cb"), ("hits", "ba")])
def test_ls_sorts_all_before_it_cuts(order: str, expected: str, cache: Spolia, stores: Stores) -> None:
    stores[0].put("aa", age_s=2, idle_s=1, data=b"1", hits=2)
    stores[1].put("bb", age_s=3, idle_s=2, data=b"22", hits=3)
    stores[0].put("cc", age_s=1, idle_s=3, data=b"333", hits=1)
    found = cache("ls", "--sort", order, "--limit", "2", "--json").json["objects"]
    assert [one["chunk_id"][0] for one in found] == list(expected)


def test_ls_takes_a_tenant_and_a_prefix(cache: Spolia, stores: Stores) -> None:
    stores[0].put("abcd")
    stores[0].put("abee", tenant="bloom")
    assert len(rows(cache("ls", "--id", "ab"))) == 2
    (line,) = rows(cache("ls", "--tenant", "bloom", "--full-ids"))
    assert chunk_id("abee").hex() in line


def test_without_stores_the_gateways_are_asked(
    spolia: Spolia, stores: Stores, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPOLIA_STORE", raising=False)
    none = spolia("cache", "ls")
    assert (none.code, none.out) == (3, "")
    gateway.more_nodes.append(
        directory_pb2.NodeRecord(node_id="kvstore-2", role=directory_pb2.NODE_ROLE_KVSTORE, address=stores[1].address)
    )
    stores[1].put("abcd")
    assert len(rows(spolia("cache", "ls"))) == 1
    assert not stores[0].asked


@pytest.mark.parametrize(
    "command",
    ["ls", "stat", "stat abcd", "verify", "gc", "pin abcd --for 1m", "pin abcd --end", "rm abcd --yes"],
)
def test_a_store_that_is_away_is_named_and_the_others_results_shown(command: str, half: Spolia, stores: Stores) -> None:
    argv = command.split()
    stores[0].put("abcd")
    done = half(*argv)
    assert done.code == 3
    assert f"error: store {NOWHERE}: " in done.err
    assert done.out or "checked 1 copy, " in done.err
    stores[0].put("abcd")
    (failed,) = half(*argv, "--json").json["failed"]
    assert (failed["store"], failed["error"]) == (NOWHERE, "Unavailable")


def test_when_no_store_answers_there_is_no_result(cache: Spolia, stores: Stores) -> None:
    for store in stores:
        store.failure = errors.Unavailable("draining")
    for argv in (["ls"], ["stat", "--json"], ["verify"], ["gc", "--json"]):
        done = cache(*argv)
        assert (done.code, done.out) == (3, "")
        assert f"error: store {stores[0].address}: draining" in done.err


def test_stat_shows_tiers_stores_and_tenants(cache: Spolia, stores: Stores) -> None:
    tiers, each, tenants = cache("stat").out.split("\n\n")
    at = stores[0].address
    assert tiers.splitlines()[1].split() == f"{at} ram 1 1.0 MiB 4.0 MiB 25 20 0 healthy".split()
    assert "286 MiB/s" in tiers.splitlines()[2]
    assert "failing" in tiers.splitlines()[2]
    assert each.splitlines()[1].split() == f"{at} kvstore-1 0 75 % 2 0 0 1 4 0 sqlite yes".split()
    assert tenants.splitlines()[1].split() == [at, "acme", "2", "no", "limit", "2.0", "KiB", "4.0", "KiB"]


def test_stat_of_a_tenant_that_holds_nothing_says_so(cache: Spolia) -> None:
    *_, tenants = cache("stat", "--tenant", "nobody").out.split("\n\n")
    assert tenants == "no objects\n"


def test_stat_as_json_has_plain_numbers(cache: Spolia, stores: Stores) -> None:
    first, second = cache("stat", "--json", "--tenant", "bloom").json["stores"]
    assert (first["store"], first["node_id"], second["node_id"]) == (stores[0].address, "kvstore-1", "kvstore-2")
    assert (first["hit_rate"], first["num_quarantined"], first["backend_reachable"]) == (0.75, 4, True)
    assert first["tiers"][1]["read_bytes_per_s"] == 3e8
    assert [held["tenant_id"] for held in first["tenants"]] == ["bloom"]


def test_stat_of_an_object_shows_every_store_that_holds_it(cache: Spolia, stores: Stores) -> None:
    made = stores[0].put("abcd", pins={"node-1": 90_000})
    stores[1].put("abcd", tiers=[RAM, DISK])
    done = cache("stat", "abcd")
    assert done.code == 0
    for shown in (made.info.digest.hex(), "raw", "0.25 s", "node-1, 1m left", stores[1].address, "ram, disk"):
        assert shown in done.out
    found = cache("stat", "abcd", "--json").json["object"]
    assert [replica["store"] for replica in found["replicas"]] == [store.address for store in stores]
    assert found["replicas"][0]["pins"] == [{"owner": "node-1", "remaining_s": 90.0}]


def test_get_writes_the_bytes_and_says_whence(cache: Spolia, stores: Stores, tmp_path: Path) -> None:
    made = stores[1].put("abcd", tiers=[DISK])
    out = tmp_path / "it.safetensors"
    done = cache("get", "abcd", "--out", str(out))
    assert (done.code, done.out) == (0, "")
    assert f"250 B from disk of {stores[1].address}" in done.err
    assert out.read_bytes() == made.data
    got = cache("get", "abcd", "--out", str(out), "--json").json
    assert (got["tier"], got["store"], got["size_bytes"]) == ("disk", stores[1].address, 250)
    assert (got["tenant_id"], got["digest"], got["failed"]) == ("acme", made.info.digest.hex(), [])


def test_get_of_a_damaged_object_leaves_no_file(cache: Spolia, stores: Stores, tmp_path: Path) -> None:
    stores[0].put("abcd")
    stores[0].damage = "frame"
    done = cache("get", "abcd", "--out", str(tmp_path / "it"))
    assert (done.code, done.out) == (1, "")
    assert "is damaged" in done.err
    assert not list(tmp_path.iterdir())


def test_get_goes_on_to_a_good_copy_and_names_the_damaged_one(cache: Spolia, stores: Stores, tmp_path: Path) -> None:
    stores[0].put("abcd")
    stores[0].damage = "whole"
    stores[1].put("abcd")
    got = cache("get", "abcd", "--out", str(tmp_path / "it"), "--json")
    assert (got.code, got.json["store"]) == (1, stores[1].address)
    assert (tmp_path / "it").read_bytes() == stores[1].objects["acme", chunk_id("abcd")].data
    assert got.json["failed"][0]["error"] == "DataCorrupt"
    assert f"error: store {stores[0].address}: " in got.err


def test_get_is_code_3_where_a_store_could_not_be_asked(half: Spolia, stores: Stores, tmp_path: Path) -> None:
    stores[0].put("abcd")
    done = half("get", "abcd", "--out", str(tmp_path / "it"))
    assert (done.code, (tmp_path / "it").stat().st_size) == (3, 250)
    assert f"error: store {NOWHERE}: " in done.err


@pytest.mark.parametrize(
    "argv",
    [
        ["pin", "abcd"],
        ["pin", "abcd", "--for", "1m", "--end"],
        ["pin", "abcd", "--for", "2h"],
        ["pin", "abcd", "--for", "0s"],
        ["pin", "abcd", "--for", "soon"],
        ["pin", "--for", "1m"],
        ["rm", "--yes"],
        ["get", "abcd"],
        ["stat", "abc"],
        ["ls", "--id", "xyz"],
        ["ls", "--sort", "colour"],
        ["gc", "--idle", "7"],
        ["gc", "--idle", "0s"],
        ["ls", "--store", "nonsense"],
        ["forget"],
        ["forget", "no/such/file"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_code_2_and_asks_nobody(argv: list[str], cache: Spolia, stores: Stores) -> None:
    done = cache(*argv)
    assert (done.code, done.out) == (2, "")
    assert done.err
    assert "Traceback" not in done.err
    assert not [*stores[0].asked, *stores[1].asked]


def test_verify_of_sound_copies_is_code_0(cache: Spolia, stores: Stores) -> None:
    stores[0].put("abcd", tiers=[RAM, DISK])
    stores[1].put("abcd")
    done = cache("verify")
    assert (done.code, done.out) == (0, "")
    assert "checked 3 copies, 30 B; 0 damaged" in done.err
    assert cache("verify", "abcd", "--tenant", "acme").code == 0
    request = stores[0].requests("Verify")[-1]
    assert (request.tenant_id, list(request.chunk_ids)) == ("acme", [chunk_id("abcd")])


def test_verify_prints_damaged_copies_and_is_code_1(cache: Spolia, stores: Stores) -> None:
    stores[1].put("abcd", tiers=[RAM, DISK])
    stores[1].damaged = [
        kvstore_pb2.DamagedCopy(tenant_id="acme", chunk_id=chunk_id("abcd"), tier=DISK, reason="layer 3")
    ]
    done = cache("verify")
    assert done.code == 1
    assert done.out.splitlines()[1].split() == [stores[1].address, "acme", "abcd00000000", "disk", "layer", "3"]
    done = cache("verify", "--json")
    assert (done.code, done.json["num_checked"], done.json["num_damaged"]) == (1, 2, 1)
    (copy,) = done.json["stores"][1]["damaged"]
    assert (copy["chunk_id"], copy["tier"], copy["reason"]) == (chunk_id("abcd").hex(), "disk", "layer 3")


def test_verify_names_what_was_damaged_also_when_a_store_dies(spolia: Spolia, cache: Spolia, stores: Stores) -> None:
    stores[1].put("abcd")
    stores[1].dies_in_verify = True
    stores[1].damaged = [
        kvstore_pb2.DamagedCopy(tenant_id="acme", chunk_id=chunk_id("abcd"), tier=RAM, reason="layer 3")
    ]
    done = cache("verify")
    assert (done.code, "abcd00000000" in done.out) == (1, True)
    assert "the store goes away" in done.err
    done = spolia("cache", "verify", "--store", stores[1].address)
    assert (done.code, done.out) == (3, "")
    assert "abcd00000000 ram layer 3" in done.err


def test_a_store_that_hangs_is_code_3(cache: Spolia, stores: Stores) -> None:
    stores[0].hang = True
    assert cache("ls", "--timeout", "0.3").code == 3


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("stat", "[ID]"), ("verify", "[ID]..."), ("get", "{ID}"), ("rm", "{ID}..."), ("forget", "{FILE}...")],
)
def test_usage_puts_arguments_in_one_pair_of_brackets(command: str, arguments: str, spolia: Spolia) -> None:
    usage = next(line for line in spolia("cache", command, "--help").out.splitlines() if "Usage:" in line)
    assert usage.split() == ["Usage:", "spolia", "cache", command, "[OPTIONS]", arguments]


@pytest.mark.parametrize(
    "columns",
    [ls.COLUMNS, stat_stores.TIERS, stat_stores.STORES, stat_stores.TENANTS, rm.COLUMNS, gc.COLUMNS, forget.COLUMNS],
)
def test_no_table_has_two_columns_of_one_name(columns: tuple[str, ...]) -> None:
    assert len(set(columns)) == len(columns)


def test_help_names_exit_codes_the_rest_last(spolia: Spolia) -> None:
    shown = " ".join(spolia("cache", "rm", "--help").out.split())
    places = [shown.index(code) for code in ("0 done", "2 wrong", "3 nobody", "4 busy", "1 no such object", "else.")]
    assert places == sorted(places)


def test_one_is_singular() -> None:
    assert [counted(n, "object") for n in (0, 1, 2)] == ["0 objects", "1 object", "2 objects"]
    assert [counted(n, "copy", "copies") for n in (0, 1, 2)] == ["0 copies", "1 copy", "2 copies"]


def test_sizes_and_ages_are_short() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1024, 1536, 102_400, 1023 << 10, 1 << 50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "100 KiB",
        "1.0 MiB",
        "1024 TiB",
    ]
    assert [human_seconds(s) for s in (0, 59.9, 60, 3599, 86399, 5e5)] == ["0s", "59s", "1m", "59m", "23h", "5d"]
    assert [parse_duration(text, "x") for text in ("30s", "1.5m", "1h", "2d")] == [30, 90, 3600, 172_800]
