from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from deploy import specs
from deploy.app import served_models
from deploy.cli import cli
from deploy.served_model import ServedModel
from deploy.settings import Settings, field_names, load
from tests.deploy.fakes import running_api


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
        ("mesh: {local: true, shards: 3}", "mesh.shards .*mesh.local leaves no shards"),
        ("mesh: {local: true, two_batch_overlap: always}", "mesh.two_batch_overlap .*mesh.local leaves no shards"),
        ("engine: {max_waiting: 0}", "engine.max_waiting = 0"),
        ("engine: {num_kv_blocks: 1}", "engine.num_kv_blocks = 1"),
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
    for slip in ("EXPERTMESH_SHARDS", "EXPERTMESH_MESH_SHARDS"):
        with pytest.raises(ValueError, match="EXPERTMESH_MESH__SHARDS"):
            load(environ={slip: "1"})
    load(environ={"EXPERTMESH_URL": "http://127.0.0.1:9"})  # of other commands
    with pytest.raises(ValueError, match=r"'mesh\.shards'"):
        load(flags={"mesh.shrads": 1})


def test_keys_are_masked_and_settings_travel_as_json() -> None:
    loaded = load(flags={"server.api_keys": ["secret"], "mesh.token": "secret"})
    assert "secret" not in repr(loaded.explain())
    assert Settings.model_validate(json.loads(loaded.settings.model_dump_json())) == loaded.settings


def test_every_flag_of_serve_is_a_setting_and_is_shown_with_its_source() -> None:
    given = {
        "--host": "0.0.0.0", "--port": "9", "--api-key": "k", "--served-model-name": "x", "--dtype": "bfloat16",
        "--max-model-len": "64", "--max-num-seqs": "3", "--max-num-batched-tokens": "77", "--block-size": "32",
        "--quantization": "int8", "--seed": "5", "--chat-template": "t", "--revision": "r", "--download-dir": "d",
        "--shards": "3", "--routers": "2", "--replicas": "2", "--transport": "star", "--log-format": "json",
        "--threads": "2",
    }  # fmt: skip
    flags = [part for pair in given.items() for part in pair]
    shown = CliRunner().invoke(cli, ["serve", "/models/a", *flags, "--print-config"])
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.output.splitlines() if line.endswith(" flag")]
    assert len(rows) == len(given) + 1
    assert ["engine.seed", "5", "flag"] in rows and ["server.api_keys", "'********'", "flag"] in rows


def test_a_router_computes_on_its_part_of_the_cores_that_shards_leave_but_of_two_at_least() -> None:
    def threads(num_cores: int = 8, **flags: object) -> int:
        return specs.router_spec(load(flags=flags).settings, num_cores=num_cores).num_threads

    assert threads(**{"mesh.shards": 3}) == 5
    assert threads(**{"mesh.shards": 3, "mesh.routers": 2}) == 2
    assert threads(**{"mesh.shards": 8}) == threads(num_cores=2, **{"mesh.shards": 2}) == 2
    assert threads(num_cores=1, **{"mesh.shards": 2}) == threads(**{"mesh.shards": 8, "mesh.routers": 3}) == 1
    assert threads(**{"mesh.local": True}) == 8
    assert threads(**{"mesh.local": True, "mesh.routers": 3}) == 2
    assert threads(**{"mesh.local": True, "mesh.routers": 9}) == 1
    assert threads(**{"mesh.local": True, "engine.threads": 3}) == threads(**{"engine.threads": 3}) == 3


def test_the_kv_cache_is_given_as_a_number_or_with_a_unit() -> None:
    def kv_cache_bytes(value: object) -> int:
        return specs.router_spec(load(flags={"engine.kv_cache_bytes": value}).settings).kv_cache_bytes

    assert kv_cache_bytes("16GiB") == kv_cache_bytes(16 << 30) == kv_cache_bytes(str(16 << 30)) == 16 << 30
    with pytest.raises(ValueError, match=r"engine\.kv_cache_bytes = '16 apples'"):
        kv_cache_bytes("16 apples")


def test_bfloat16_is_also_that_of_keys_and_values() -> None:
    def kv_dtype(**flags: object) -> str:
        return specs.router_spec(load(flags=flags).settings).kv_dtype

    assert kv_dtype() == kv_dtype(**{"engine.dtype": "float16"}) == "float32"
    assert kv_dtype(**{"engine.dtype": "bfloat16"}) == "bfloat16"
    assert kv_dtype(**{"engine.dtype": "bfloat16", "engine.kv_dtype": "float32"}) == "float32"


def test_the_api_promises_the_context_that_routers_have(model_dir: Path) -> None:
    def served(**flags: object) -> int:
        settings = load(flags={"model": {"path": str(model_dir)}, **flags}).settings
        return served_models(settings)[0].max_model_len

    whole = served()
    assert served(**{"engine.num_kv_blocks": 5}) == 4 * 16 < whole
    assert served(**{"engine.num_kv_blocks": 5, "model.max_model_len": 40}) == 40
    with pytest.raises(ValueError, match="lower max_model_len"):
        served(**{"engine.num_kv_blocks": 5, "model.max_model_len": 100})


def test_the_seed_is_that_of_requests_without_one(model_dir: Path) -> None:
    settings = load(flags={"model": {"path": str(model_dir), "served_names": ["tiny"]}, "engine.seed": 7}).settings
    served: list[ServedModel] = served_models(settings)
    with running_api(served, settings) as api:
        for body in ({}, {"seed": 3}, {}):
            httpx.post(api.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1, **body})
        assert [request["sampling"]["seed"] for request in api.router.requests] == [7, 3, 7]
