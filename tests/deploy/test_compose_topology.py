"""The compose file's processes, each in a network namespace of its own: used, restarted, killed and cut off.

`make deploy-test` runs all of it, `make test` what takes about a minute.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator

import pytest
from deploy_container import REPOSITORY, Container
from deploy_load import Load
from deploy_network import why_no_namespaces
from deploy_topology import Topology

from spolia_bench.redis_server import redis_binary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTLE_S = 0.5
"""The load runs alone before and after an event."""

AWAY_S = 2.0

CUT_S = 5.0
AT_ONCE_S = 0.05
"""Between the two signals: what runs is told apart from what waits, and little of it ends by itself."""


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    """`docker compose up --scale prefill=1`, without the engine: the second one takes seconds to start."""
    reason = why_no_namespaces() or ("" if redis_binary() else "there is no redis-server to run")
    if reason:
        pytest.skip(reason)
    with Topology(tmp_path_factory.mktemp("topology"), {}, {"prefill": 1}) as made:
        made.up()
        yield made


@pytest.fixture(scope="module")
def user(topology: Topology) -> Container:
    """Where a user's commands run."""
    return topology.client()


@pytest.fixture(scope="module")
def load(user: Container) -> Iterator[Load]:
    """What asks while things are done to the topology. Says in the end what it met."""
    made = Load(user)
    try:
        yield made
    finally:
        made.close()


def roll(topology: Topology, load: Load, *containers: Container) -> None:
    """Restarts one after the other, as an update does."""
    for container in containers:
        with load.event(f"restart of {container.name}"):
            topology.restart(container)
        time.sleep(SETTLE_S)


def replays(topology: Topology, user: Container) -> float:
    """Answers that went on at another decode node."""
    read = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"
    told = user.run("python", "-c", read, f"http://{topology.of('gateway')[0].address}:9400/metrics")
    found = re.findall(r"^spolia_gateway_replays_total\{.*\} (\S+)$", told.stdout, re.MULTILINE)
    assert found, told.stderr
    return sum(map(float, found))


def example() -> str:
    found = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found, "the README has no Python example"
    return found[1].replace("127.0.0.1:7300", "gateway:7300")


def test_the_readme_example_runs_against_the_project(user: Container) -> None:
    who = ("SPOLIA_CA_FILE=/volumes/certs-operator/ca.crt", "SPOLIA_API_KEY=$(cat /volumes/certs-operator/api.key)")
    told = user.run("sh", "-c", f'{" ".join(who)} exec python -c "$0"', example(), timeout_s=60.0)
    assert told.returncode == 0, told.stderr
    reused = [int(number) for number in re.findall(r"\| (\d+) of \d+ prompt tokens reused", told.stdout)]
    assert len(reused) == 2
    assert reused[0] == 0 < reused[1], "the second order reuses what the first computed"


def test_every_process_has_an_address_and_a_name_of_its_own(topology: Topology) -> None:
    running = [each for each in topology.containers.values() if each.running]
    assert len({each.address for each in running}) == len(running) >= 6
    seen = topology.of("gateway")[0].run("cat", "/etc/hosts").stdout
    assert all(f"{each.address} {each.service.name}" in seen for each in running)


def test_a_restart_under_load_fails_no_request(topology: Topology, load: Load) -> None:
    with load.running():
        time.sleep(SETTLE_S)
        for service in ("decode", "kvstore", "redis", "gateway"):
            roll(topology, load, topology.of(service)[0])
    load.check()


def test_a_killed_decode_node_ends_no_request(topology: Topology, load: Load) -> None:
    victim = topology.of("decode")[0]
    with load.running():
        time.sleep(SETTLE_S)
        with load.event("SIGKILL of a decode node"):
            victim.kill()
            time.sleep(AWAY_S)
    victim.start()  # while the next test runs
    load.check()


def test_a_killed_redis_ends_no_request(topology: Topology, load: Load) -> None:
    redis = topology.of("redis")[0]
    with load.running():
        time.sleep(SETTLE_S)
        with load.event("Redis killed"):
            redis.kill()
            time.sleep(AWAY_S)
        with load.event("Redis back"):
            redis.start()
            topology.wait_healthy(redis)
            time.sleep(AWAY_S)
    load.check()


@pytest.mark.parametrize("service", ["decode"])
def test_a_cut_network_keeps_no_request_past_its_deadline(topology: Topology, load: Load, service: str) -> None:
    topology.wait_healthy()
    cut_off = topology.of(service)[-1]
    with load.running():
        time.sleep(SETTLE_S)
        with load.event(f"{service} cut off"):
            topology.cut(cut_off)
            time.sleep(CUT_S)
            topology.mend(cut_off)
        time.sleep(2 * SETTLE_S)
    load.check_in_time()


@pytest.mark.deploy
def test_more_decode_nodes_join_and_every_replica_is_restarted_in_turn(
    topology: Topology, user: Container, load: Load
) -> None:
    with load.running():
        time.sleep(SETTLE_S)
        with load.event("--scale decode=4 --scale prefill=2"):
            added = [*topology.scale("decode", 4), *topology.scale("prefill", 2)]
        assert len(added) == 3
        for service in ("decode", "prefill", "kvstore", "redis", "gateway"):
            roll(topology, load, *topology.of(service))
    load.check()
    seen = user.run("cat", "/etc/hosts").stdout
    assert seen.count(" decode decode-") == 4


@pytest.mark.deploy
def test_what_a_decode_node_cannot_finish_goes_on_at_another(topology: Topology, user: Container, load: Load) -> None:
    before = replays(topology, user)
    victims = topology.of("decode")
    with load.running(num_long=2 * len(victims)):  # so that each has some, as the gateway spreads them
        time.sleep(SETTLE_S)
        for victim in victims:
            with load.event(f"{victim.name} must end at once"):
                victim.signal(signal.SIGTERM)
                time.sleep(AT_ONCE_S)
                victim.signal(signal.SIGTERM)
                assert victim.wait() == 128 + signal.SIGTERM
            with load.event("its start"):
                victim.start()
                topology.wait_healthy(victim)
            time.sleep(SETTLE_S)
    load.check()
    assert replays(topology, user) > before, "no stream was cut"


@pytest.mark.deploy
@pytest.mark.parametrize("service", ["gateway", "prefill", "kvstore", "redis"])
def test_other_services_may_be_cut_off_too(topology: Topology, load: Load, service: str) -> None:
    test_a_cut_network_keeps_no_request_past_its_deadline(topology, load, service)


@pytest.mark.deploy
@pytest.mark.parametrize("service", ["prefill", "kvstore"])
def test_a_killed_node_ends_no_request(topology: Topology, load: Load, service: str) -> None:
    victim = topology.of(service)[0]
    with load.running():
        time.sleep(SETTLE_S)
        with load.event(f"SIGKILL of {victim.name}"):
            victim.kill()
            time.sleep(AWAY_S)
        with load.event("its start"):
            victim.start()
            topology.wait_healthy(victim)
        time.sleep(SETTLE_S)
    load.check()
