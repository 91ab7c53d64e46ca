"""The gateway as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spolia_gateway.__main__ import main

TIMEOUT_S = 60


def test_a_gateway_loads_no_torch() -> None:
    code = (
        "import sys, spolia_gateway.__main__, spolia_gateway.node;"
        "print([name for name in ('torch', 'transformers', 'spolia_engine', 'spolia_kernels') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_that_cannot_work_end_with_2_and_their_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, words in (
        (["--model", str(model)], "directory must be set"),
        (["--directory", "localhost:1"], "model must be set"),
        (["--directory", "localhost:1", "--model", str(tmp_path)], "no readable tokenizer"),
    ):
        assert main([*argv, "--port", "0"]) == 2
        assert words in capsys.readouterr().err


def test_bad_flags_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--max-attempts", "0"])
    assert caught.value.code == 2
    assert "max_attempts must be at least 1" in capsys.readouterr().err


def test_a_process_serves_until_it_is_asked_to_end(model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "spolia_gateway",
        "--port",
        "0",
        "--http-port",
        "0",
        "--model",
        str(model),
        "--directory",
        "127.0.0.1:9",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPOLIA_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        assert ready[:2] == ["READY", "gateway"]
        assert any(field.startswith("http=127.0.0.1:") for field in ready[3:])
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
