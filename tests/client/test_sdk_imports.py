"""What a fresh process loads."""

from __future__ import annotations

import subprocess
import sys


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_sdk_needs_grpc_and_protobuf_only() -> None:
    loaded = modules_after("import spolia")
    assert "grpc" in loaded
    assert not loaded & {"torch", "transformers", "typer", "rich", "blake3", "xxhash", "numpy", "structlog"}
    assert not {name for name in loaded if name.startswith("spolia_")} - {
        name for name in loaded if name.startswith("spolia_core")
    }
