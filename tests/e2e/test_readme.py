"""The README's example, pasted as it stands."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from e2e_world import DEMO_MODEL

ROOT = Path(__file__).parents[2]


def readme_example() -> str:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found, "the README has no Python example"
    return found.group(1)


def content(url: str) -> str:
    with urlopen(url, timeout=10) as answer:
        return str(answer.read(), "utf-8")


@pytest.mark.slow
def test_the_readme_example_works_on_spolia_up() -> None:
    """The port is the one thing changed: the default one may be taken where the tests run."""
    up = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "spolia.cli.main",
            "up",
            "--model",
            str(DEMO_MODEL),
            "--port",
            "0",
            "--http-port",
            "0",
            "--json",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert up.stdout is not None
        said = json.loads(up.stdout.readline())
        example = readme_example().replace("127.0.0.1:7300", said["address"])
        ran = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stderr
        lines = ran.stdout.splitlines()
        reused = [int(match) for match in re.findall(r"\| (\d+) of \d+ prompt tokens reused", ran.stdout)]
        assert len(reused) == 2, lines
        assert reused[0] == 0 < reused[1], "the second order must reuse what the first computed"
        assert "Spolia" in content(f"{said['url']}/"), "the page"
        assert len(said["nodes"]) == 4
        for node in said["nodes"]:
            assert "spolia_node_info" in content(f"http://{node['metrics_address']}/metrics"), node
    finally:
        up.send_signal(signal.SIGINT)
        try:
            code = up.wait(30)
        except subprocess.TimeoutExpired:
            up.kill()
            pytest.fail("spolia up did not end on Ctrl-C")
    assert code == 0
