"""Settings, ports, probes and times in the manifests are those of the services."""

from __future__ import annotations

from docker_files import stages
from k8s_world import CONFIGS, POD_IP, Manifests, Workload, amount

from spolia_gateway.config import GatewayConfig
from spolia_kvstore.config import KVStoreConfig
from spolia_node.addresses import addresses_in
from spolia_node.config import NodeConfig, load_config
from spolia_node.probe_settings import ProbeSettings, read_settings
from spolia_node.settings import settings_of

GRPC, METRICS, HTTP = 7300, 9400, 8000
OF_OTHERS = {"HOME", "TRITON_CACHE_DIR"}
"""Variables that are read by what nodes are made with."""

MIN_FAREWELL_S = 5
STORE_OVERHEAD_BYTES = 384 << 20
"""What a store may take beyond its budget: 256 MB (docs/store.md), and a Python process."""

WORKER_OVERHEAD_BYTES = 500 << 20
"""What a worker on a CPU takes beside its pool and the weights."""


def config_of(found: Workload) -> NodeConfig:
    return load_config(CONFIGS[found.role], [], found.environment)


def test_every_variable_is_a_setting_of_that_role_and_all_load(manifests: Manifests) -> None:
    for found in manifests.workloads:
        known = {item.env for item in settings_of(CONFIGS[found.role])}
        assert set(found.environment) - OF_OTHERS <= known, found.role
        assert config_of(found).node_id == f"spolia-{found.role}-0"


def test_manifests_and_images_agree(manifests: Manifests) -> None:
    """What only an image sets is a setting of that role too, and what both set is the same."""
    for found in manifests.workloads:
        image = stages()[found.image.removeprefix("spolia-")]
        for name in set(image.env) & set(found.environment):
            assert image.env[name] == found.environment[name], (found.role, name)
        config = load_config(CONFIGS[found.role], [], image.env | found.environment)
        assert config == config_of(found)
        context = found.pod["securityContext"]
        assert image.user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_no_variable_is_set_twice(manifests: Manifests) -> None:
    """The later would win, and nobody would see it."""
    for found in manifests.workloads:
        names = [item["name"] for item in found.container["env"]]
        for source in found.container["envFrom"]:
            names += found.maps[source["configMapRef"]["name"]]
        assert sorted(names) == sorted(set(names)), found.role


def test_nodes_are_reached_at_their_pods_by_the_ports_that_are_declared(manifests: Manifests) -> None:
    for found in manifests.workloads:
        config = config_of(found)
        assert config.host == "0.0.0.0"
        assert config.advertise_host == POD_IP
        declared = {"grpc": config.port, "metrics": config.metrics_port}
        if isinstance(config, GatewayConfig):
            declared["http"] = config.http_port
            assert config.http_port == HTTP
        assert found.ports == declared
        assert (config.port, config.metrics_port) == (GRPC, METRICS)


def test_the_directory_is_a_service_of_the_stores(manifests: Manifests) -> None:
    for found in manifests.workloads:
        directory = config_of(found).directory
        if found.role == "kvstore":  # has one of its own, and shares its members by Redis
            assert not directory
            continue
        (address,) = addresses_in(directory)
        name, _, port = address.partition(":")
        service = manifests.named("Service", name)
        assert manifests.selected_by({"matchLabels": service["spec"]["selector"]}) == {"kvstore"}
        assert int(port) in [each["port"] for each in service["spec"]["ports"]]
        assert service["spec"].get("clusterIP") != "None"


def test_several_stores_share_a_redis(manifests: Manifests) -> None:
    """Without one each would have an index and members of its own, behind one address."""
    store = manifests.workload("kvstore")
    config = config_of(store)
    assert isinstance(config, KVStoreConfig)
    assert (store.object["spec"]["replicas"] > 1) == bool(config.redis_url)


def test_all_nodes_serve_the_same_model_from_the_same_volume(manifests: Manifests) -> None:
    workers = [found for found in manifests.workloads if found.role != "kvstore"]
    names = {(found.environment["SPOLIA_MODEL"], found.environment["SPOLIA_MODEL_NAME"]) for found in workers}
    assert len(names) == 1
    for found in workers:
        mount = found.mounts[found.environment["SPOLIA_MODEL"]]
        assert mount["readOnly"] is True
        assert found.volumes[mount["name"]]["persistentVolumeClaim"]["claimName"] == "spolia-model"


def test_folders_that_settings_name_are_mounted(manifests: Manifests) -> None:
    for found in manifests.workloads:
        assert found.environment["SPOLIA_TLS_DIR"] == "/certs"
        assert secret_at(found, "/certs") == f"spolia-{found.role}-tls"
        assert found.environment["HOME"] == "/tmp"
        assert "emptyDir" in found.volumes[found.mounts["/tmp"]["name"]]
        for name in ("SPOLIA_TABLES_DIR", "TRITON_CACHE_DIR"):
            assert found.environment.get(name, "/tmp/").startswith("/tmp/")
        if "SPOLIA_KEYS" in found.environment:
            assert found.environment["SPOLIA_KEYS"] == "/keys/keys.json"
            assert secret_at(found, "/keys") == "spolia-keys"


def secret_at(found: Workload, path: str) -> str:
    name: str = found.volumes[found.mounts[path]["name"]]["secret"]["secretName"]
    return name


def test_a_store_has_the_memory_and_the_disk_that_it_may_use(manifests: Manifests) -> None:
    store = manifests.workload("kvstore")
    config = config_of(store)
    assert isinstance(config, KVStoreConfig)
    memory = amount(store.container["resources"]["limits"]["memory"])
    assert memory >= config.budget_bytes + STORE_OVERHEAD_BYTES
    assert amount(store.container["resources"]["requests"]["memory"]) >= config.budget_bytes
    assert str(config.data_dir) == "/data"
    claim = store.volumes[store.mounts["/data"]["name"]]["claim"]
    assert amount(claim["resources"]["requests"]["storage"]) >= config.disk_budget_bytes * 1.1
    assert claim["accessModes"] == ["ReadWriteOnce"], "a store's folder is its own"


def test_a_worker_on_a_cpu_has_the_memory_of_its_pool(manifests: Manifests) -> None:
    for role in ("prefill", "decode"):
        found = manifests.workload(role)
        if found.environment.get("SPOLIA_DEVICE", "cpu") == "cpu":
            pool = int(found.environment["SPOLIA_POOL_BYTES"])
            assert amount(found.container["resources"]["limits"]["memory"]) >= pool + WORKER_OVERHEAD_BYTES


def test_pods_get_the_time_that_a_drain_takes(manifests: Manifests) -> None:
    for found in manifests.workloads:
        stop = found.container.get("lifecycle", {}).get("preStop", {})
        prestop_s = stop["sleep"]["seconds"] if stop else 0
        assert found.pod["terminationGracePeriodSeconds"] >= prestop_s + found.drain_s + MIN_FAREWELL_S
    assert manifests.workload("gateway").container["lifecycle"]["preStop"]["sleep"]["seconds"] >= 5


def test_a_rollout_cuts_no_request_of_a_default_length(production: Manifests) -> None:
    gateway = production.workload("gateway")
    config = config_of(gateway)
    assert isinstance(config, GatewayConfig)
    assert gateway.drain_s >= config.default_timeout_s


def probe_of(found: Workload, kind: str) -> ProbeSettings:
    command = found.container[kind]["exec"]["command"]
    assert command[:3] == ["python", "-m", "spolia_node.probe"]
    return read_settings(command[3:], found.environment)


def test_probes_ask_the_node_in_its_own_container(manifests: Manifests) -> None:
    for found in manifests.workloads:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = probe_of(found, kind)
            assert asked.address == f"127.0.0.1:{config_of(found).port}"
            assert asked.role == found.role
            assert str(asked.tls_dir) == "/certs"
            assert asked.service == "", "all that the node does"
            assert asked.timeout_s < found.container[kind]["timeoutSeconds"]


def test_ready_is_who_serves(manifests: Manifests) -> None:
    for found in manifests.workloads:
        assert not probe_of(found, "readinessProbe").alive


def test_liveness_kills_a_stuck_engine_and_nobody_who_drains_or_waits(manifests: Manifests) -> None:
    for found in manifests.workloads:
        liveness = found.container["livenessProbe"]
        if found.role in ("gateway", "kvstore"):
            assert probe_of(found, "livenessProbe").alive
        else:  # with an engine NOT_SERVING is stalled, or draining, and that ends before the last failure counts
            assert not probe_of(found, "livenessProbe").alive
            until_killed_s = liveness["periodSeconds"] * liveness["failureThreshold"]
            assert until_killed_s > found.pod["terminationGracePeriodSeconds"]


def test_starting_may_take_its_time(manifests: Manifests) -> None:
    for found in manifests.workloads:
        startup = found.container["startupProbe"]
        patience_s = startup["periodSeconds"] * startup["failureThreshold"]
        on_gpu = found.environment.get("SPOLIA_DEVICE") == "cuda"
        assert patience_s >= (1200 if on_gpu else 120)
        # A gateway starts without a decode node; workers and stores have started when they serve.
        assert probe_of(found, "startupProbe").alive == (found.role == "gateway")
