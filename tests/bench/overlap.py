"""What two micro-batches in turn gain over one, for one router of one thread over shards on this machine.

    python -m tests.bench.overlap [--shape small] [--quantization int8] [--shards 1,2]

Engine alone, tokens a second: decoding at several batches, then a prompt of 512. `auto` is what routers do by default.
"""

from __future__ import annotations

import argparse
import os
from typing import get_args

from actors.ray_shards import worker_environment
from actors.specs import TwoBatchOverlap
from tests.bench.checkpoints import checkpoint
from tests.bench.mesh import Arrangement, Mesh
from tests.bench.run import ENGINES

BATCHES = (8, 16, 32, 64)


def measure(shape: str, arrangement: Arrangement) -> list[float]:
    with Mesh(checkpoint(shape), arrangement) as mesh:
        rates = [mesh.decode(batch=batch, prompt=128)[0]["tok_s"] for batch in BATCHES]
        return [*rates, mesh.prefill(repeats=15)[0]["tok_s"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(ENGINES), default="small")
    parser.add_argument("--quantization", choices=["int8", "int4"], default=None)
    parser.add_argument("--shards", default="1,2", help="numbers of shards, with commas")
    options = parser.parse_args()
    os.environ.update(worker_environment(1))
    print("shards  overlap " + "".join(f"{f'b{batch}':>8}" for batch in BATCHES) + f"{'prefill':>9}")
    for shards in map(int, options.shards.split(",")):
        for setting in get_args(TwoBatchOverlap):
            arrangement = Arrangement(shards=shards, quantization=options.quantization, two_batch_overlap=setting)
            *decodes, prefill = measure(options.shape, arrangement)
            figures = "".join(f"{rate:8.0f}" for rate in decodes) + f"{prefill:9.0f}"
            print(f"{shards:6}  {setting:8}{figures}", flush=True)


if __name__ == "__main__":
    main()
