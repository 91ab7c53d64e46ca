"""A store with a folder keeps its name: where chunks belong is decided by it."""

from pathlib import Path

from spolia_kvstore.config import KVStoreConfig


def test_a_store_has_the_same_name_after_a_restart(tmp_path: Path) -> None:
    first, again = (KVStoreConfig(data_dir=tmp_path / "a").node_id for _ in range(2))
    assert first == again
    assert first.startswith("kvstore-")
    assert KVStoreConfig(data_dir=tmp_path / "b").node_id != first


def test_a_name_that_was_given_wins_and_a_store_without_a_folder_has_a_new_one_each_time(tmp_path: Path) -> None:
    assert KVStoreConfig(data_dir=tmp_path, node_id="mine").node_id == "mine"
    assert not (tmp_path / "node-id").exists()
    assert KVStoreConfig().node_id != KVStoreConfig().node_id


def test_a_name_that_is_none_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "node-id").write_bytes(b"\xff\xfe\n")
    assert KVStoreConfig(data_dir=tmp_path).node_id.startswith("kvstore-")
