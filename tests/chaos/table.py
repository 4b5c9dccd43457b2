"""The chaos suite's table. Each configuration leaves its outcome in results/; this writes all of them into README.md.

python -m tests.chaos.table
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from tests.chaos.configurations import CONFIGURATIONS, Outcome

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
WORDS = {
    "kill_shard": "shard SIGKILL",
    "stop_shard": "shard SIGSTOP",
    "pause_shard": "shard SIGSTOP, back after 2.5 to 4.5 s",
    "kill_two_shards": "two shards SIGKILL at once",
    "stop_two_shards": "two shards SIGSTOP at once",
    "kill_during_recovery": "a second shard SIGKILL during recovery",
    "kill_during_scale_out": "shard SIGKILL during a scale-out",
    "kill_during_rebalance": "shard SIGKILL during a rebalance",
    "kill_router": "router SIGKILL",
    "kill_supervisor": "supervisor SIGKILL",
    "kill_supervisor_and_shard": "supervisor and shard SIGKILL",
    "scale_out_and_in": "one shard more, and back",
    "rebalance": "experts moved by load",
    "partition": "a host's packets dropped",
    "kill_node": "a host lost with all its processes",
    "kill_ray_head": "Ray's head (GCS) SIGKILL",
}
PLACES = {c.name: c.words for c in CONFIGURATIONS} | {
    "hosts": "3 shards on 3 hosts, 2 replicas",
    "head": "2 shards, 1 router, head with Redis",
}


def save(name: str, outcome: Outcome) -> None:
    RESULTS.mkdir(exist_ok=True)
    rounded = {kind: [round(s, 3) for s in stalls] for kind, stalls in outcome.stalls.items()}
    data = {**asdict(outcome), "between_tokens_s": round(outcome.between_tokens_s, 4), "stalls": rounded}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def saved() -> dict[str, Outcome]:
    """All outcomes there are, in the order of the table."""
    files = [RESULTS / f"{name}.json" for name in PLACES]
    return {file.stem: Outcome(**json.loads(file.read_text())) for file in files if file.is_file()}


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown: median and worst stall of each kind of fault."""
    rows = ["| fault | mesh | times | median | worst |", "|---|---|---|---|---|"]
    for name, outcome in outcomes.items():
        for kind in sorted(outcome.stalls, key=list(WORDS).index):
            stalls = outcome.stalls[kind]
            middle, worst = statistics.median(stalls), max(stalls)
            rows.append(f"| {WORDS[kind]} | {PLACES[name]} | {len(stalls)} | {middle:.2f} s | {worst:.2f} s |")
    return "\n".join(rows)


def summary(outcomes: dict[str, Outcome]) -> str:
    """What all of it was measured on."""
    num_faults = sum(len(stalls) for o in outcomes.values() for stalls in o.stalls.values())
    num_requests = sum(o.num_requests for o in outcomes.values())
    times_ms = sorted(round(1e3 * o.between_tokens_s) for o in outcomes.values())
    ordinary = " to ".join(map(str, dict.fromkeys((times_ms[0], times_ms[-1]))))
    models, cores = ({getattr(o, name) for o in outcomes.values()} for name in ("model", "num_cores"))
    return (
        f"{num_faults} faults under 16 streams of the model `{'`, `'.join(sorted(models))}` "
        f"on {'/'.join(map(str, sorted(cores)))} cores: {num_requests:,} requests, all finished, all answers those "
        f"without faults. Without faults a stream gets a token every {ordinary} ms. Longest time between two tokens of "
        "any stream, from the fault until everything is back:"
    )


def main() -> None:
    outcomes = saved()
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or not outcomes:
        raise SystemExit(f"{README} needs {BEGIN} and {END}, and {RESULTS} an outcome: run `make chaos`")
    README.write_text(f"{before}{BEGIN}\n{summary(outcomes)}\n\n{table(outcomes)}\n{END}{after}")


if __name__ == "__main__":
    main()
