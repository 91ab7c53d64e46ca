"""Secrets and certificates: none is in the manifests, and those that a user makes are those that pods read."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from k8s_secrets import SCRIPT, made
from k8s_world import K8S, SECRETS, Manifests, manifests_in, sources

from spolia_core.errors import InvalidRequest
from spolia_core.node_name import CERTIFIED_ROLES
from spolia_kvstore.redis_target import redis_target
from spolia_node.certificate_checks import check_role
from spolia_node.certificates import NodeCertificates


def test_no_secret_is_in_the_manifests(manifests: Manifests) -> None:
    assert not manifests.of("Secret")
    for path in sources():
        assert "PRIVATE KEY" not in path.read_text()


def keys_of_pods(manifests: Manifests) -> dict[str, set[str]]:
    """By Secret, the keys that pods cannot start without; none where a folder is mounted whole."""
    found: dict[str, set[str]] = {}
    for workload in manifests.workloads:
        for item in workload.container["env"]:
            reference = item.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                found.setdefault(reference["name"], set()).add(reference["key"])
        for volume in workload.volumes.values():
            if "secret" in volume:
                found.setdefault(volume["secret"]["secretName"], set())
    return found


def test_the_script_makes_what_pods_read(folder: Path, built: Mapping[str, str]) -> None:
    secrets = made(folder, "--redis-url-file", f"{folder}/redis-url", "--redis-ca", f"{folder}/certs/ca.crt")
    for text in built.values():
        for name, keys in keys_of_pods(manifests_in(text)).items():
            assert keys <= set(secrets[name]), name
    assert len(secrets["spolia-cluster"]["cluster-secret"]) == 64
    assert secrets["spolia-keys"]["keys.json"] == (folder / "keys.json").read_bytes()
    assert secrets["spolia-redis"]["url"].decode() == SECRETS["spolia-redis", "url"], "without the line's end"
    assert set(secrets["spolia-redis"]) == {"url", "ca.crt"}


def test_nodes_take_the_certificates_of_the_script(folder: Path) -> None:
    secrets = made(folder)
    assert "spolia-redis" not in secrets
    for role in CERTIFIED_ROLES:
        mounted = folder / role
        mounted.mkdir()
        for key, content in secrets[f"spolia-{role}-tls"].items():
            (mounted / key).write_bytes(content)
        assert NodeCertificates(mounted, role).current()


def test_the_script_makes_nothing_where_something_is_missing(folder: Path) -> None:
    (folder / "certs" / "decode.key").unlink()
    arguments = ["--certs", f"{folder}/certs", "--keys", f"{folder}/keys.json", "--print"]
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "decode.key cannot be read" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("arguments", [[], ["--keys"], ["--what", "x"], ["--keys", "/dev/null", "--redis-ca", "x"]])
def test_the_script_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("create-secrets: ")


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_the_script_says_what_it_takes(asked: str) -> None:
    done = subprocess.run([SCRIPT, asked], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "k8s/create-secrets --certs DIR --keys FILE" in done.stdout
    assert "#" not in done.stdout


def test_cert_manager_makes_certificates_that_nodes_take(production: Manifests) -> None:
    issued = {found["metadata"]["name"]: found["spec"] for found in production.of("Certificate")}
    assert set(issued) == {f"spolia-{role}" for role in CERTIFIED_ROLES} | {"spolia-authority"}
    for role in CERTIFIED_ROLES:
        spec = issued[f"spolia-{role}"]
        check_role(certificate_of(spec), role, Path(role))
        for other in set(CERTIFIED_ROLES) - {role}:
            with pytest.raises(InvalidRequest):
                check_role(certificate_of(spec), other, Path(other))
        assert spec["secretName"] == f"spolia-{role}-tls"
        assert {"server auth", "client auth"} <= set(spec["usages"])
        assert hours(spec["renewBefore"]) < hours(spec["duration"])
        issuer = production.named("Issuer", spec["issuerRef"]["name"])
        assert issuer["spec"]["ca"]["secretName"] == issued["spolia-authority"]["secretName"]
    assert issued["spolia-authority"]["isCA"] is True
    root = production.named("Issuer", issued["spolia-authority"]["issuerRef"]["name"])
    assert root["spec"] == {"selfSigned": {}}
    mounted = {found for found in keys_of_pods(production) if found.endswith("-tls")}
    assert mounted <= {spec["secretName"] for spec in issued.values()}


def certificate_of(spec: Mapping[str, list[str]]) -> x509.Certificate:
    """One with the names that are asked for, as cert-manager writes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in spec["uris"]]
    names += [x509.DNSName(host) for host in spec["dnsNames"]]
    authority = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    now = datetime.now(UTC)
    built = authority.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return built.add_extension(x509.SubjectAlternativeName(names), critical=True).sign(key, hashes.SHA256())


def hours(text: str) -> int:
    return int(text.removesuffix("h"))


def test_a_gateways_certificate_has_the_names_of_its_services(production: Manifests) -> None:
    names = production.named("Certificate", "spolia-gateway")["spec"]["dnsNames"]
    for service in production.of("Service"):
        if production.selected_by({"matchLabels": service["spec"]["selector"]}) == {"gateway"}:
            name = service["metadata"]["name"]
            assert {name, f"{name}.spolia", f"{name}.spolia.svc", f"{name}.spolia.svc.cluster.local"} <= set(names)


def test_gateways_want_keys(manifests: Manifests) -> None:
    environment = manifests.workload("gateway").environment
    assert environment["SPOLIA_KEYS"]
    assert "SPOLIA_ALLOW_ANONYMOUS" not in environment
    for found in manifests.workloads:
        assert "SPOLIA_ALLOW_PLAINTEXT" not in found.environment


def test_the_urls_that_are_documented_are_taken() -> None:
    documented = (K8S.parent / "docs" / "deploy.md").read_text()
    urls = [word.strip("`'\"") for word in documented.split() if word.strip("`'\"").startswith(("redis", "rediss"))]
    urls = [url for url in urls if "://" in url and "…" not in url]
    assert {url.partition("://")[0].removeprefix("rediss").removeprefix("redis") for url in urls} >= {
        "+sentinel",
        "+cluster",
    }
    for url in urls:
        redis_target(url, 1.0)


@pytest.mark.parametrize(
    ("answer", "code", "makes"),
    [("exit 0", 0, True), ("echo secret/spolia-cluster", 0, False), ("echo 'cannot be reached' >&2; exit 1", 1, False)],
    ids=["it has none", "it has one", "it cannot be asked"],
)
def test_a_clusters_secret_is_made_where_there_is_none_and_nowhere_else(
    folder: Path, answer: str, code: int, makes: bool
) -> None:
    kubectl, log = folder / "bin" / "kubectl", folder / "log"
    kubectl.parent.mkdir()
    kubectl.write_text(f'#!/bin/sh\necho "$*" >>{log}\ncase $1 in get) {answer} ;; apply) cat >/dev/null ;; esac\n')
    kubectl.chmod(0o755)
    done = subprocess.run(
        [SCRIPT, "--keys", f"{folder}/keys.json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": f"{kubectl.parent}:/usr/bin:/bin"},
    )
    assert done.returncode == code, done.stderr
    assert ("create secret generic spolia-cluster " in log.read_text()) == makes
