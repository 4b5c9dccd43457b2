"""Where a model's files are, as the hub's cache has them."""

from __future__ import annotations

from pathlib import Path

from actors.model_source import cached_model


def test_a_snapshot_without_weights_is_not_the_model(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert cached_model("owner/model", download_dir=str(tmp_path)) is None
    (snapshot / "config.json").write_text("{}")
    assert cached_model("owner/model", download_dir=str(tmp_path)) is None, "`plan` left it"
    (snapshot / "model.safetensors").write_bytes(b"")
    assert cached_model("owner/model", download_dir=str(tmp_path)) == snapshot
