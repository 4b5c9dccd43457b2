"""Imports point one way, and what must start quickly doesn't import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "model": {"model"},
    "cluster": {"cluster"},
    "actors": {"actors", "model", "cluster"},
    "deploy": {"deploy", "actors", "model", "cluster"},
}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_only_what_lies_below_them(package):
    imported = set()
    for path in (ROOT / package).rglob("*.py"):
        ours = imported_packages(path) & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[package]}"
        imported |= ours
    assert imported == MAY_IMPORT[package], "what may be imported and isn't"


def test_nothing_that_serves_runs_code_from_a_file_or_the_network():
    for path in (path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")):
        if "recipe" not in path.parts:
            unsafe = imported_packages(path) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
            text = path.read_text(encoding="utf-8")
            assert not unsafe and "torch.load" not in text and "trust_remote_code=" not in text, path


def test_ray_and_torch_distributed_stay_in_a_few_files():
    ray_users, distributed_users = set(), set()
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            name = str(path.relative_to(ROOT))
            if "ray" in imported_packages(path):
                ray_users.add(name)
            if "torch.distributed" in text and "import" in text and name.startswith(("cluster", "actors", "model")):
                distributed_users.add(name)
    assert {name for name in ray_users if not name.startswith("deploy/")} == {
        "actors/ray_mesh.py",
        "actors/ray_shards.py",
    }
    assert distributed_users == {
        "cluster/process_group.py",
        "cluster/router_transports.py",
        "actors/membership.py",
    }


@pytest.mark.parametrize(
    "module", ["deploy.cli", "deploy.app", "deploy.launch", "actors.ray_mesh", "actors.ray_shards", "actors.supervisor"]
)
def test_ingress_supervisor_and_cli_start_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
