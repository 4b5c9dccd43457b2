"""The service beside vllm's CPU build and transformers, with the same checkpoints and loads, in one run.

    python -m tests.bench.peers [--shapes small,mid] [--out DIR]

vllm is loaded over HTTP exactly as the service is; transformers has no server and is called in a process. A peer that
can't be installed or started is in the report with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from actors.ray_shards import worker_environment
from tests.bench import limits, service
from tests.bench.checkpoints import checkpoint
from tests.bench.peer_environment import VLLM, peer_python
from tests.bench.run import PRECISIONS, RESULTS, SERVED, rounded
from tests.ports import free_port

TRANSFORMERS = str(Path(__file__).parent / "peer_transformers.py")


def ours(shape: str, way: str, precision: str = "bf16") -> dict[str, Any]:
    arguments, environment = SERVED[way]
    wanted = [str(checkpoint(shape)), *arguments, *PRECISIONS[precision]]
    with service.serving(wanted, {**worker_environment(1), **environment}) as running:
        return _load(shape, running.url, running.model)


def vllm(shape: str) -> dict[str, Any]:
    with _vllm_serving(checkpoint(shape)) as url:
        return _load(shape, url, "m")


def transformers(shape: str) -> dict[str, Any]:
    command = [sys.executable, TRANSFORMERS, str(checkpoint(shape))]

    def in_process() -> dict[str, Any]:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=600, env=_plain_environment()
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-300:])
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    return limits.beside(in_process)


def _load(shape: str, url: str, model: str) -> dict[str, Any]:
    found = limits.beside(partial(service.figures, url, model))
    return {**found, "clients": service.sixteen_clients(url, model) if shape == "small" else None}


@contextlib.contextmanager
def _vllm_serving(path: Path) -> Iterator[str]:
    python, port = peer_python(), free_port()
    environment = {
        **_plain_environment(),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(python.parent / "vllm"), "serve", str(path), "--dtype", "bfloat16", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "32", "--no-enable-prefix-caching", "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    ) as process:
        try:
            service.wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # of its own session: the server and its engine


def _plain_environment() -> dict[str, str]:
    """Without what the service sets for its own processes."""
    return {name: value for name, value in os.environ.items() if name not in worker_environment(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="small,mid")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    file = options.out / "bench.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    shapes = options.shapes.split(",")
    found = [one for one in results.get("peers", []) if one["shape"] not in shapes]
    for shape in shapes:
        servers: dict[str, Callable[[str], dict[str, Any]]] = {
            "expertmesh, 2 shards": lambda shape: ours(shape, "2 shards"),
            VLLM: vllm,
            "expertmesh, local": lambda shape: ours(shape, "local"),
            "expertmesh, local, bf16 activations": lambda shape: ours(shape, "local", "bf16 activations"),
            "transformers": transformers,
        }
        for server, measure in servers.items():
            began = time.monotonic()
            try:
                one = measure(shape)
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                one = {"why_not": " ".join(str(error).split())[-300:]}
            found.append({"shape": shape, "server": server, **one})
            print(f"{time.monotonic() - began:6.1f} s  {shape} {server}: {one}", flush=True)
    results["peers"] = found
    results.setdefault("measured", {})["peers"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(results), indent=1) + "\n")
    from tests.bench.report import write, write_readme

    write(rounded(results), options.out)
    if options.out == RESULTS and "http" in results:
        write_readme(rounded(results))


if __name__ == "__main__":
    main()
