"""The compose files say nothing that the services and their images would not take."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from check_jsonschema.builtin_schemas import get_builtin_schema
from docker_files import (
    COMPOSE,
    COMPOSE_GPU,
    DOCKER,
    ROOT,
    compose,
    load,
    num_bytes,
    seconds,
    stage_of,
    stages,
)
from jsonschema.validators import validator_for

from spolia_core.node_name import NODE_ROLES
from spolia_decode.config import DecodeConfig
from spolia_gateway.config import GatewayConfig
from spolia_kvstore.config import KVStoreConfig
from spolia_node import config as node_config
from spolia_node.config import FILE_ENV, NodeConfig, load_config
from spolia_node.probe_settings import DEFAULT_TIMEOUT_S, read_settings
from spolia_node.settings import settings_of
from spolia_prefill.config import PrefillConfig

CONFIGS: dict[str, type[NodeConfig]] = {
    "gateway": GatewayConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "kvstore": KVStoreConfig,
    "kvstore-2": KVStoreConfig,
}
OURS = (*CONFIGS, "setup", "tools")
SERVICES = compose()["services"]
BESIDE_MODEL_BYTES = 500 << 20
"""What a worker takes beside model and pool, at most."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `setup` makes, by who is given it."""
    folder = tmp_path_factory.mktemp("setup")
    for volume in SERVICES["setup"]["volumes"]:
        (folder / Path(volume.partition(":")[2]).name).mkdir()
    first_start = load("first_start")
    first_start.prepare(folder)
    return folder


def environment(service: str, extra: dict[str, str] | None = None) -> dict[str, str]:
    """What a container of it finds: of the image, then of the compose file."""
    return stage_of(SERVICES[service]).env | SERVICES[service]["environment"] | (extra or {})


def config_of(service: str, made: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, str] | None = None) -> Any:
    monkeypatch.setattr(node_config, "address_towards", lambda peers: f"address towards {' or '.join(peers)}")
    found = environment(service, extra)
    role = service.removesuffix("-2")
    assert found[FILE_ENV] == "/certs/spolia.toml"
    assert mounted(service, "/certs") == f"certs-{role}:/certs:ro"
    return load_config(CONFIGS[service], [], found | {FILE_ENV: str(made / role / "spolia.toml")})


def mounted(service: str, target: str) -> str:
    (volume,) = [each for each in SERVICES[service]["volumes"] if each.split(":")[1] == target]
    return str(volume)


@pytest.mark.parametrize("path", [COMPOSE, COMPOSE_GPU], ids=lambda path: path.name)
def test_dockers_own_schema_takes_the_file(path: Path):
    schema = get_builtin_schema("vendor.compose-spec")
    validator = validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(compose(path))] == []
    assert list(validator.iter_errors({"services": {"a": {"imaeg": "b"}}})), "it refuses what is wrong"


@pytest.mark.parametrize("service", CONFIGS)
def test_a_node_starts_with_the_settings_that_its_container_finds(
    service: str, made: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(service, made, monkeypatch)
    assert config.cluster_secret == (made / "authority/cluster-secret").read_text()
    if service.startswith("kvstore"):
        assert config.advertise_host == service
        assert (made / "redis/password.conf").read_text() == f"requirepass {config.redis_url.split(':')[2][:-6]}\n"
        assert config.redis_url.endswith(f"@redis:{6379}/0")
    else:
        assert config.advertise_host == f"address towards {' or '.join(config.directory.split(','))}"
    if service in ("gateway", "kvstore"):
        assert config.keys == f"{mounted(service, '/keys').split(':')[1]}/keys.json"


@pytest.mark.parametrize("service", CONFIGS)
def test_every_variable_of_ours_is_a_setting_of_that_role(service: str):
    known = {item.env for item in settings_of(CONFIGS[service])} | {FILE_ENV}
    assert {name for name in environment(service) if name.startswith("SPOLIA_")} <= known
    assert environment(service) == environment(service) | stage_of(SERVICES[service]).env, "as the image alone has it"


@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_the_override_for_gpus_changes_what_is_there(service: str, made: Path, monkeypatch: pytest.MonkeyPatch):
    override = compose(COMPOSE_GPU)["services"][service]
    config = config_of(service, made, monkeypatch, override["environment"])
    assert (config.device, config.dtype) == ("cuda", "bfloat16")
    known = {item.env for item in settings_of(CONFIGS[service])}
    assert {name for name in override["environment"] if name.startswith("SPOLIA_")} <= known
    assert override["build"]["target"] == stage_of(override).name == "worker-cuda"
    assert stages()["worker-cuda"].command == stages()["worker-cpu"].command
    (device,) = override["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_ports_that_are_published_are_those_that_are_served_and_on_this_machine_alone(
    made: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of("gateway", made, monkeypatch)
    published = [port.split(":") for port in SERVICES["gateway"]["ports"]]
    assert {int(inside) for *_, inside in published} == {config.port, config.http_port}
    assert set(stages()["gateway"].ports) == {config.port, config.http_port, config.metrics_port}
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_what_may_be_scaled_has_no_name_or_port_of_its_own(service: str):
    assert not {"container_name", "ports", "hostname"} & SERVICES[service].keys()
    assert SERVICES[service]["deploy"]["replicas"] == 2
    assert "SPOLIA_NODE_ID" not in environment(service)


@pytest.mark.parametrize("service", CONFIGS)
def test_the_probe_asks_where_the_node_listens_and_may_take_its_time(
    service: str, made: Path, monkeypatch: pytest.MonkeyPatch
):
    stage = stage_of(SERVICES[service])
    assert stage.probe[:2] == ("python", "-m")
    assert importlib.util.find_spec(stage.probe[2]) is not None
    asked = read_settings(stage.probe[3:], environment(service))
    config = config_of(service, made, monkeypatch)
    assert asked.address == f"127.0.0.1:{config.port}"
    assert (str(asked.tls_dir), asked.role) == ("/certs", "")
    assert [path.stem for path in (made / service.removesuffix("-2")).glob("*.crt") if path.stem in NODE_ROLES] == [
        service.removesuffix("-2")
    ], "the probe finds its role by the one certificate"
    for timing in (SERVICES[service]["healthcheck"], stage.probe_options):
        assert seconds(timing["timeout"]) > DEFAULT_TIMEOUT_S


@pytest.mark.parametrize("service", CONFIGS)
def test_a_node_is_given_longer_to_end_than_it_may_drain(service: str, made: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(service, made, monkeypatch)
    assert seconds(SERVICES[service]["stop_grace_period"]) >= config.drain_timeout_s + 5


@pytest.mark.parametrize("service", [*CONFIGS, "setup"])
def test_what_a_container_runs_is_there(service: str):
    stage = stage_of(SERVICES[service])
    command = tuple(SERVICES[service].get("command", stage.command))
    if service == "setup":
        assert stage.entrypoint == ("python", "/opt/first_start.py")
        assert command == ("/setup",)
        return
    assert stage.entrypoint == ("python", "-m")
    assert command == (f"spolia_{service.removesuffix('-2')}",)
    assert importlib.util.find_spec(f"{command[0]}.__main__") is not None


@pytest.mark.parametrize("service", OURS)
def test_our_images_are_of_this_release_and_run_as_nobody_in_particular(service: str):
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert SERVICES[service]["image"].endswith(f":{release}")
    assert SERVICES[service]["user"] == stage_of(SERVICES[service]).user == "10001:10001"
    assert SERVICES[service]["pull_policy"] == "never", "nothing else than what is built here"
    if service != "tools":
        assert SERVICES[service]["build"]["target"] == stage_of(SERVICES[service]).name


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_confined(service: str):
    given = SERVICES[service]
    assert given["read_only"] is True
    assert given["cap_drop"] == ["ALL"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & given.keys()
    assert given["security_opt"] == ["no-new-privileges:true"]
    assert given["user"] not in ("root", "0", "0:0")
    limits = given["deploy"]["resources"]["limits"]
    assert num_bytes(limits["memory"]) > 0
    assert 0 < limits["pids"] <= 512


@pytest.mark.parametrize("service", CONFIGS)
def test_memory_limits_hold_what_the_settings_take(service: str, made: Path, monkeypatch: pytest.MonkeyPatch):
    limit = num_bytes(SERVICES[service]["deploy"]["resources"]["limits"]["memory"])
    config = config_of(service, made, monkeypatch)
    if isinstance(config, KVStoreConfig):
        assert limit >= config.budget_bytes + (100 << 20)
    elif not isinstance(config, GatewayConfig):
        assert limit >= config.pool_bytes + BESIDE_MODEL_BYTES


def test_no_secret_is_in_the_file_and_each_is_mounted_where_it_is_needed_only():
    for name, service in SERVICES.items():
        secret = {"SPOLIA_CLUSTER_SECRET", "SPOLIA_REDIS_URL", "SPOLIA_API_KEY"} & set(service.get("environment", {}))
        assert not secret, f"{name}: {secret}"
    users: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            users.setdefault(volume.split(":")[0], set()).add(name)
    assert users["authority"] == {"setup"}
    for role in ("gateway", "prefill", "decode"):
        assert users[f"certs-{role}"] == {"setup", role}
    assert users["certs-kvstore"] == {"setup", "kvstore", "kvstore-2"}
    assert users["certs-operator"] == {"setup", "tools"}
    assert users["redis-password"] == {"setup", "redis"}
    assert users["store"] == {"kvstore"}
    assert users["store-2"] == {"kvstore-2"}
    assert set(compose()["volumes"]) == {name for name in users if not name.startswith((".", "/"))}


def test_nodes_are_reached_from_no_network_but_their_own():
    networks = compose()["networks"]
    assert {name for name, given in networks.items() if not given.get("internal")} == {"front"}
    on_front = {name for name, service in SERVICES.items() if "front" in service.get("networks", ())}
    assert on_front == {"gateway", "grafana"}
    assert {name for name, service in SERVICES.items() if "state" in service.get("networks", ())} == {
        "kvstore",
        "kvstore-2",
        "redis",
    }


def test_prometheus_asks_every_node_on_the_port_that_nodes_serve(made: Path, monkeypatch: pytest.MonkeyPatch):
    (job,) = compose(DOCKER / "prometheus/prometheus.yml")["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) == set(CONFIGS)
    for service in CONFIGS:
        config = config_of(service, made, monkeypatch)
        assert (config.metrics_port, config.metrics_host) == (found["port"], "")


def test_grafana_finds_its_source_and_the_dashboard():
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert {source for source in mounts if source.startswith("./")} == {
        "./grafana/provisioning",
        "./grafana/spolia.json",
    }
    for source in ("grafana/provisioning", "grafana/spolia.json", "prometheus/prometheus.yml"):
        assert (DOCKER / source).exists()
    (provider,) = compose(DOCKER / "grafana/provisioning/dashboards/spolia.yaml")["providers"]
    assert mounts["./grafana/spolia.json"] == f"{provider['options']['path']}/spolia.json"
    (source,) = compose(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    variables = json.loads((DOCKER / "grafana/spolia.json").read_text())["templating"]["list"]
    assert [variable["query"] for variable in variables if variable["type"] == "datasource"] == [source["type"]]


def test_the_documents_list_the_variables_that_there_are():
    """Of both files; and the start of `docs/deploy.md` says the defaults."""
    text = COMPOSE.read_text() + COMPOSE_GPU.read_text()
    section = (ROOT / "docs/deploy.md").read_text().partition("\n## Compose\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row[1])}
    assert listed == set(re.findall(r"\$\{(\w+)", text))
