"""What `spolia up` prints of a cluster that has started."""

from __future__ import annotations

import json
import re
from urllib.request import urlopen

import pytest

from spolia import Client
from spolia.cli.up import _announce
from spolia.local_cluster import LocalCluster

PATIENCE_S = 10.0


@pytest.mark.slow
def test_every_address_that_is_printed_answers(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    _announce(cluster, as_json=False)
    shown = capsys.readouterr().out
    page = re.search(r"^to look at: (\S+)$", shown, re.MULTILINE)
    assert page is not None, shown
    assert "<title>" in answer_of(page[1])
    api = re.search(r"^OpenAI's clients: base URL (\S+)$", shown, re.MULTILINE)
    assert api is not None, shown
    assert [model["object"] for model in json.loads(answer_of(f"{api[1]}/models"))["data"]] == ["model"]
    over_grpc = re.search(r"spolia generate --address (\S+) ", shown)
    assert over_grpc is not None, shown
    with Client(over_grpc[1]) as client:
        assert client.models()
    for node in cluster.nodes:
        line = re.search(rf"^{node.name} +{node.address} +(\S+/metrics) +{node.pid} ", shown, re.MULTILINE)
        assert line is not None, shown
        assert f'spolia_node_info{{node_id="{node_id_of(node.address, cluster)}"' in answer_of(line[1])


def answer_of(url: str) -> str:
    with urlopen(url, timeout=PATIENCE_S) as answer:
        assert answer.status == 200
        told: str = answer.read().decode()
        return told


def node_id_of(address: str, cluster: LocalCluster) -> str:
    with Client(cluster.address) as client:
        return next(node.node_id for node in client.cluster().nodes if node.address == address)
