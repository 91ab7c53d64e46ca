"""Settings come from the right place, and a bad one stops the start by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia_core.errors import InvalidRequest
from spolia_node.config import NodeConfig, at_least, load_config, one_of, role_of, setting
from spolia_node.settings import settings_of


@dataclass(frozen=True)
class DecodeConfig(NodeConfig):
    max_batch_rows: int = setting(8, "Rows of a step; 100 % of a small GPU.", check=at_least(1))
    share_spans: bool = setting(True, "Attend shared spans once.")
    watermark: float = setting(0.5, "Share of blocks kept free.")
    model_path: Path | None = setting(None, "Folder of the model.")
    codecs: tuple[str, ...] = setting(("raw",), "Codecs accepted, best first.")
    dtype: str = setting("float32", "Compute dtype.", check=one_of("float32", "bfloat16"))
    pool_bytes: int | None = setting(None, "Size of the pool; none: measured.", check=at_least(1024))

    def check_together(self) -> str | None:
        return "watermark must be 0 when max_batch_rows is 1" if self.max_batch_rows == 1 and self.watermark else None


def load(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None, file: Path | None = None) -> DecodeConfig:
    return load_config(DecodeConfig, argv, environ or {}, file)


def refusal(
    capsys: pytest.CaptureFixture[str],
    argv: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> str:
    with pytest.raises(SystemExit) as stopped:
        load(argv, environ, file)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "spolia.toml"
        path.write_text(text)
        return path

    return write


def test_defaults_run_on_a_laptop():
    config = load()
    assert (config.host, config.advertise_host, config.max_batch_rows) == ("127.0.0.1", "127.0.0.1", 8)
    assert config.node_id.startswith("decode-")


def test_two_nodes_get_two_ids():
    assert load().node_id != load().node_id


def test_flag_wins_over_environment_over_role_table_over_top_level_over_default(toml):
    top = toml("max_batch_rows = 2\n")
    assert load(file=top).max_batch_rows == 2
    table = toml("max_batch_rows = 2\n[decode]\nmax_batch_rows = 3\n")
    assert load(file=table).max_batch_rows == 3
    env = {"SPOLIA_MAX_BATCH_ROWS": "4"}
    assert load(environ=env, file=table).max_batch_rows == 4
    assert load(["--max-batch-rows", "5"], env, table).max_batch_rows == 5


def test_the_file_is_that_of_the_flag_then_of_the_environment(tmp_path: Path):
    for name, rows in (("a", 2), ("b", 3), ("c", 4)):
        (tmp_path / name).write_text(f"max_batch_rows = {rows}\n")
    env = {"SPOLIA_CONFIG": str(tmp_path / "b")}
    assert load(file=tmp_path / "a").max_batch_rows == 2
    assert load(environ=env, file=tmp_path / "a").max_batch_rows == 3
    assert load([f"--config={tmp_path / 'c'}"], env, tmp_path / "a").max_batch_rows == 4


def test_every_type_reads_from_text_and_from_toml(toml):
    text = {
        "SPOLIA_SHARE_SPANS": "off",
        "SPOLIA_WATERMARK": "1",
        "SPOLIA_MODEL_PATH": "/models/tiny",
        "SPOLIA_CODECS": "int8, raw",
        "SPOLIA_POOL_BYTES": "2048",
    }
    file = toml(
        'share_spans = false\nwatermark = 1\nmodel_path = "/models/tiny"\ncodecs = ["int8", "raw"]\npool_bytes = 2048\n'
    )
    for config in (load(environ=text), load(file=file)):
        assert (config.share_spans, config.watermark, config.pool_bytes) == (False, 1.0, 2048)
        assert isinstance(config.watermark, float)
        assert config.model_path == Path("/models/tiny")
        assert config.codecs == ("int8", "raw")


def test_an_optional_setting_can_be_set_to_none(toml):
    file = toml('model_path = "/models/tiny"\npool_bytes = 4096\n')
    config = load(["--model-path", "none"], {"SPOLIA_POOL_BYTES": ""}, file)
    assert config.model_path is None
    assert config.pool_bytes is None


@pytest.mark.parametrize("argv", [["--log-json"], ["--log-json", "true"], ["--log-json=yes"]])
def test_a_bare_boolean_flag_means_true(argv: list[str]):
    assert load(argv).log_json is True


@given(st.integers(min_value=2, max_value=2**40))
def test_a_number_reads_the_same_from_flag_and_environment(rows: int):
    assert load([f"--max-batch-rows={rows}"]).max_batch_rows == rows
    assert load(environ={"SPOLIA_MAX_BATCH_ROWS": str(rows)}).max_batch_rows == rows


def test_a_bad_value_names_setting_source_limit_and_value(capsys, toml):
    assert "max_batch_rows must be at least 1, got 0 from --max-batch-rows" in refusal(
        capsys, ["--max-batch-rows", "0"]
    )
    env = {"SPOLIA_DTYPE": "int3"}
    assert "dtype must be one of float32, bfloat16, got int3 from SPOLIA_DTYPE" in refusal(capsys, environ=env)
    file = toml("[decode]\nwatermark = true\n")
    assert f"watermark must be a number, got true from [decode] of {file}" in refusal(capsys, file=file)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--port", "http"], "must be a whole number"),
        (["--watermark", "much"], "must be a number"),
        (["--watermark", "nan"], "must be a finite number"),
        (["--share-spans", "maybe"], "must be true or false"),
        (["--port", "65536"], "between 0 and 65535"),
        (["--max-message-bytes", "1000"], "between 5242880 and"),
        (["--directory", "store"], 'directory must be "host:port"'),
        (["--directory", "store:²"], 'directory must be "host:port"'),
        (["--max-batch-rows", "1"], "watermark must be 0 when max_batch_rows is 1"),
    ],
)
def test_what_is_refused(capsys, argv: list[str], says: str):
    assert says in refusal(capsys, argv)


@pytest.mark.parametrize("line", ["port = 1.5", "host = 5", "codecs = [1]", "share_spans = 1", 'port = "x"'])
def test_a_file_value_of_another_type_is_refused(capsys, toml, line: str):
    assert f"{line.split()[0]} must be" in refusal(capsys, file=toml(line + "\n"))


def test_all_problems_are_told_at_once(capsys):
    said = refusal(capsys, ["--port", "x"], {"SPOLIA_DTYPE": "int3"})
    assert "port must be" in said
    assert "dtype must be" in said


def test_unknown_flags_and_keys_stop_the_start(capsys, toml):
    assert "--max-rows" in refusal(capsys, ["--max-rows", "4"])
    assert "--max-batch" in refusal(capsys, ["--max-batch", "4"])  # an abbreviation is not a flag
    assert "max_rows in" in refusal(capsys, file=toml("max_rows = 4\n"))
    assert "max_rows in [decode]" in refusal(capsys, file=toml("[decode]\nmax_rows = 4\n"))
    assert "decoder in" in refusal(capsys, file=toml("[decoder]\nport = 4\n"))


def test_an_unknown_flag_is_told_in_a_line_that_says_who_lists_the_known(capsys):
    said = refusal(capsys, ["--data-dir", "kv"])
    assert said == "decode: unrecognized arguments: --data-dir kv; spolia serve decode --help lists the settings\n"


def test_tables_of_other_roles_are_none_of_this_nodes_business(toml):
    assert load(file=toml("[gateway]\nrequests_per_s = 4\n[decode]\nport = 5\n")).port == 5


def test_a_file_that_cannot_be_read_stops_the_start(capsys, tmp_path: Path, toml):
    assert "absent.toml cannot be read" in refusal(capsys, file=tmp_path / "absent.toml")
    assert "cannot be read" in refusal(capsys, file=toml("port = = 4"))


def test_help_prints_every_setting_with_sentence_variable_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        load(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    entries = " ".join(shown.split())  # argparse breaks lines where it likes
    for known in settings_of(DecodeConfig):
        assert f"{known.help} [{known.env}, default {known.shown(known.default)}]" in entries
        assert f"  {known.flag} " in shown
    assert len(settings_of(DecodeConfig)) == len(fields(DecodeConfig)) > 15


def test_help_names_both_ways_to_run_a_node(capsys):
    with pytest.raises(SystemExit):
        load(["--help"])
    usage, other, *_ = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: spolia serve decode ")
    assert other.startswith("   or: python -m spolia_decode ")


def test_what_is_not_set_is_shown_as_it_would_be_written(capsys):
    by_name = {known.name: known for known in settings_of(DecodeConfig)}
    assert by_name["pool_bytes"].shown(None) == "none"
    assert by_name["pool_bytes"].from_text("none") is None
    assert by_name["node_id"].shown("") == by_name["cluster_secret"].shown("") == '""'


@pytest.mark.parametrize("host", ["10.0.0.7", "node-1", "::"])
def test_the_default_secret_is_refused_off_loopback(capsys, host: str):
    said = refusal(capsys, ["--host", host, "--advertise-host", "node-1"])
    assert "cluster_secret must be changed when host is not loopback" in said
    argv = ["--host", host, "--advertise-host", "node-1", "--cluster-secret", "s3cret", "--allow-plaintext"]
    assert load(argv).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_the_default_secret_is_good_on_loopback(host: str):
    assert load(["--host", host]).advertise_host == host


def test_a_wildcard_host_needs_an_address_peers_can_use(capsys):
    argv = ["--host", "0.0.0.0", "--cluster-secret", "s3cret", "--tls-dir", "certs"]
    assert "advertise_host must say" in refusal(capsys, argv)
    assert load([*argv, "--advertise-host", "node-1"]).advertise_host == "node-1"


def test_the_secret_is_never_shown(capsys):
    config = load(["--cluster-secret", "s3cret"])
    assert "s3cret" not in repr(config)
    with pytest.raises(SystemExit):
        load(["--help"])
    assert "spolia-development" not in capsys.readouterr().out


def test_values_are_checked_however_the_object_is_made():
    with pytest.raises(InvalidRequest, match="port must be between 0 and 65535") as refused:
        NodeConfig(port=-1)
    assert refused.value.field == "port"


def test_the_role_is_the_class_name_unless_said_otherwise():
    class Other(NodeConfig):
        role: ClassVar[str] = "prefill"

    assert role_of(DecodeConfig) == "decode"
    assert role_of(Other) == "prefill"


def test_a_type_no_text_can_be_read_as_is_refused_when_the_class_is_opened():
    @dataclass(frozen=True)
    class Wrong(NodeConfig):
        weights: frozenset[str] = setting(frozenset(), "Not a setting.")

    with pytest.raises(TypeError, match="weights"):
        settings_of(Wrong)
