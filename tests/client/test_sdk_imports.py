"""What a fresh process loads."""

from __future__ import annotations

from fresh_process import modules_after


def test_the_sdk_needs_grpc_and_protobuf_only() -> None:
    loaded = modules_after("import spolia")
    assert "grpc" in loaded
    assert not loaded & {"torch", "transformers", "typer", "rich", "blake3", "xxhash", "numpy", "structlog"}
    assert not {name for name in loaded if name.startswith("spolia_")} - {
        name for name in loaded if name.startswith("spolia_core")
    }
