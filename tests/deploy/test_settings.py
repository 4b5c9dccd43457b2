from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.settings import Settings, field_names, load


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("server:\n  port: 1000\n  host: 0.0.0.0\nmesh:\n  shards: 4\n")
    environ = {"EXPERTMESH_SERVER__PORT": "2000", "EXPERTMESH_MESH__SHARDS": "5", "HOME": "/", "EXPERTMESH_OTHER": "x"}
    loaded = load(file=file, environ=environ, flags={"mesh.shards": 6, "mesh.routers": None})
    assert (loaded.settings.server.port, loaded.settings.server.host) == (2000, "0.0.0.0")
    assert loaded.settings.mesh.shards == 6
    origins = {name: source for name, _, source in loaded.explain()}
    assert origins["server.port"] == "environment EXPERTMESH_SERVER__PORT"
    assert origins["server.host"] == f"file {file}"
    assert origins["mesh.shards"] == "flag" and origins["mesh.routers"] == "default"
    assert list(origins) == field_names()


def test_texts_of_the_environment_become_lists_maps_and_nothing() -> None:
    environ = {
        "EXPERTMESH_SERVER__API_KEYS": "a, b",
        "EXPERTMESH_MODEL__HEADS": "{topics: /models/topics}",
        "EXPERTMESH_MODEL__MAX_MODEL_LEN": "none",
        "EXPERTMESH_ENGINE__PREFIX_CACHE": "false",
    }
    settings = load(environ=environ).settings
    assert settings.server.api_keys == ("a", "b")
    assert settings.model.heads == {"topics": "/models/topics"}
    assert settings.model.max_model_len is None and settings.engine.prefix_cache is False


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("server: {prot: 1}", "unknown setting 'server.prot'.*'server.port'"),
        ("sever: {port: 1}", "unknown section 'sever'.*'server'"),
        ("server: 1", "expected settings"),
        ("- 1", "expected sections"),
        ("server: {port: 70000}", r"server.port = 70000 \(file .*\): Input should be less"),
        ("mesh: {transport: pigeon}", "mesh.transport = 'pigeon'"),
        ("server: [", "settings file"),
        ("server: {api_keys: ['a b ']}", "server.api_keys"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, yaml: str, message: str) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text(yaml)
    with pytest.raises(ValueError, match=message) as caught:
        load(file=file)
    assert "\n" not in str(caught.value)


def test_unknown_environment_and_flags_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'mesh\.shards'"):
        load(environ={"EXPERTMESH_MESH__SHARD": "1"})
    with pytest.raises(ValueError, match=r"'mesh\.shards'"):
        load(flags={"mesh.shrads": 1})


def test_keys_are_masked_and_settings_travel_as_json() -> None:
    loaded = load(flags={"server.api_keys": ["secret"], "mesh.token": "secret"})
    assert "secret" not in repr(loaded.explain())
    assert Settings.model_validate(json.loads(loaded.settings.model_dump_json())) == loaded.settings
