"""Everything of the service's speed that needs no other server, as tables and plots in tests/bench/results.

    python -m tests.bench.run [--only limits,calibration,engine,growth,http,front] [--shapes small,mid]

Parts that aren't asked for keep the figures of the last run. Timings mean something only on a machine that does
nothing else: the report says what the memory read at in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.ray_shards import worker_environment
from model.native.shared_object import load_shared_object
from tests.bench import calibration, growth, limits, service
from tests.bench.checkpoints import checkpoint
from tests.bench.mesh import Arrangement, Mesh

RESULTS = Path(__file__).parent / "results"
PROMPTS = service.PROMPTS
BATCHES = tuple(PROMPTS)
# Flags of `expertmesh serve`. bf16 keeps activations float32; with the second they are as of other servers.
PRECISIONS: dict[str, list[str]] = {
    "bf16": [],
    "bf16 activations": ["--dtype", "bfloat16"],
    "int8": ["--quantization", "int8"],
    "int4": ["--quantization", "int4"],
}
OVER_SHARDS = ("bf16", "int8")  # the engine's figures have the others; all together stays within a quarter of an hour
# What the mesh's price is of: on `mid` it stays up, and each int8 mesh is measured in turns with it.
ALONE = Arrangement(quantization="int8", threads=2)
ENGINES: dict[str, list[Arrangement]] = {
    "small": [
        Arrangement(),
        Arrangement(shards=2),
        *(Arrangement(shards=2, quantization=precision) for precision in ("int8", "int4")),
    ],
    "mid": [
        Arrangement(shards=2),
        ALONE,
        *(Arrangement(quantization="int8", shards=shards) for shards in (1, 2, 3, 4, 6)),
        Arrangement(quantization="int8", shards=2, threads=2),
        Arrangement(quantization="int8", shards=2, routers=2),
        Arrangement(quantization="int4", shards=2),
    ],
}
ORDER = tuple(PRECISIONS)
KEYS = {"engine": ("shape", "precision", "shards", "routers", "threads"), "http": ("shape", "precision", "way")}
SERVED = {"local": (["--local"], {"EXPERTMESH_ENGINE__THREADS": "2"}), "2 shards": (["--shards", "2"], {})}


@dataclass(slots=True)
class Bench:
    """A run and what it has found, on disk after every figure."""

    file: Path
    shapes: Sequence[str]
    began: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", flush=True)

    def keep(self, part: str, found: Any) -> None:
        """Replace a part's figures, or one entry of a list."""
        if part in ("engine", "http"):
            others = [one for one in self.results.get(part, []) if any(one[k] != found[k] for k in KEYS[part])]
            found = [*others, found]
            found.sort(key=lambda one: [list(ENGINES).index(one["shape"]), *(ORDER.index(one["precision"]),)])
        self.results[part] = found
        self.results.setdefault("measured", {})[part] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(rounded(self.results), indent=1) + "\n")


def measure_limits(bench: Bench) -> None:
    bench.keep("limits", found := limits.measure())
    shared_object = load_shared_object()
    bench.keep("kernels", shared_object.level if shared_object else "plain torch")
    for one in found:
        bench.say(f"{one['threads']} threads read {one['read_gb_s']} GB/s, float32 {one['float32_gflop_s']} GFLOP/s")


def measure_calibration(bench: Bench) -> None:
    bench.keep("calibration", calibration.calibrate())


def measure_engines(bench: Bench) -> None:
    """For each shape and arrangement of ENGINES, per batch what Mesh.decode says, and the prefill rate."""
    for shape in bench.shapes:
        path = checkpoint(shape)
        with contextlib.ExitStack() as kept:
            alone = kept.enter_context(Mesh(path, ALONE)) if shape == "mid" else None
            for arrangement in ENGINES[shape]:
                is_priced = arrangement.shards > 0 and arrangement.quantization == "int8"
                with contextlib.ExitStack() as own:
                    mesh = alone if alone and arrangement == ALONE else own.enter_context(Mesh(path, arrangement))
                    measured = limits.beside(partial(_engine_figures, mesh, arrangement, alone if is_priced else None))
                found = {
                    "shape": shape,
                    "precision": arrangement.quantization or "bf16",
                    "shards": arrangement.shards,
                    "routers": arrangement.routers,
                    "threads": arrangement.threads,
                    **measured,
                }
                bench.keep("engine", found)
                rates = ", ".join(f"b{batch} {rate:.1f}" for batch, rate in measured["tok_s"].items())
                bench.say(f"{shape} {arrangement}: {rates} tok/s")


def _engine_figures(mesh: Mesh, arrangement: Arrangement, alone: Mesh | None) -> dict[str, Any]:
    """With `alone` also "alone_tok_s" and "alone_prefill": what that did right after each."""
    steps, found = {}, {"alone_tok_s": {}} if alone else {}
    for batch in BATCHES:
        steps[str(batch)] = mesh.decode(batch=batch, prompt=PROMPTS[batch], num_steps=20)
        if alone:
            [step] = alone.decode(batch=batch, prompt=PROMPTS[batch], num_steps=20)
            found["alone_tok_s"][str(batch)] = step["tok_s"]
    found["prefill"] = None
    if arrangement.routers == 1:
        found["prefill"] = mesh.prefill()[0]["tok_s"]
        if alone:
            found["alone_prefill"] = alone.prefill()[0]["tok_s"]
    found["tok_s"] = {batch: sum(router["tok_s"] for router in routers) for batch, routers in steps.items()}
    return {**found, "steps": {batch: routers[0] for batch, routers in steps.items()}}


def measure_http(bench: Bench) -> None:
    """Whole services: tokens a second for each shape and precision, in one process and OVER_SHARDS."""
    bench.results["http"] = [one for one in bench.results.get("http", []) if one["shape"] not in bench.shapes]
    for shape in bench.shapes:
        path = checkpoint(shape)
        for precision, flags in PRECISIONS.items():
            for way, (arguments, environment) in SERVED.items():
                if way == "2 shards" and precision not in OVER_SHARDS:
                    continue
                with service.serving([str(path), *arguments, *flags], environment) as running:
                    rates = limits.beside(partial(service.figures, running.url, running.model))
                    clients = None
                    if shape == "small" and precision.startswith("bf16"):
                        clients = service.sixteen_clients(running.url, running.model)
                one = {"shape": shape, "precision": precision, "way": way, "start_s": running.start_s}
                bench.keep("http", {**one, **rates, "clients": clients})
                bench.say(f"{shape} {precision} {way}: " + ", ".join(f"{k} {v:.1f}" for k, v in rates.items()))


def measure_front(bench: Bench) -> None:
    with service.serving([str(checkpoint("small")), "--quantization", "int8", "--local"]) as running:
        bench.keep("front", found := service.front_overhead(running))
    bench.say(f"the HTTP front adds {found['added_ttft_ms']:.1f} ms to TTFT, {found['added_itl_ms']:.2f} ms to ITL")


def measure_growth(bench: Bench) -> None:
    bench.keep("growth", growth.measure(bench.say))


PARTS: dict[str, Callable[[Bench], None]] = {
    "limits": measure_limits,
    "calibration": measure_calibration,
    "engine": measure_engines,
    "growth": measure_growth,
    "http": measure_http,
    "front": measure_front,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas; empty: the report alone")
    parser.add_argument("--shapes", default=",".join(ENGINES), help="of engine and http, with commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.update(worker_environment(1))
    bench = Bench(options.out / "bench.json", options.shapes.split(","))
    if bench.file.exists():
        bench.results = json.loads(bench.file.read_text())
    for part in filter(None, options.only.split(",")):
        if part not in PARTS:
            parser.error(f"--only={part!r}: choose of {', '.join(PARTS)}")
        bench.say(f"{part} ...")
        PARTS[part](bench)
    from tests.bench.report import write, write_readme

    options.out.mkdir(parents=True, exist_ok=True)
    write(rounded(bench.results), options.out)
    if options.out == RESULTS and "http" in bench.results:
        write_readme(rounded(bench.results))
    bench.say(f"wrote {options.out}")


def rounded(value: Any) -> Any:
    """Five digits are more than any timing has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
