"""Tables (markdown) and plots (PNG) of what tests.bench.run measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench import plan_accuracy
from tests.bench.calibration import shape_of
from tests.bench.limits import decode_limit, prefill_limit
from tests.bench.mesh import place
from tests.bench.step_parts import PARTS

COLUMNS = ("b1", "b8", "b32", "prefill")
MACHINE = ("read GB/s", "float32 GFLOP/s")
# Tokens a second that were set as goals for `mid`; those against other servers are in `make bench-peers`.
BARS = {"int8": (40, 110, 180, 400), "int4": (50, 120, 180, 400)}
README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def write(results: dict[str, Any], folder: Path) -> None:
    (folder / "report.md").write_text(render(results), encoding="utf-8")
    from tests.bench import plots

    plots.draw(results, folder)


def render(results: dict[str, Any]) -> str:
    """The report, with the sections whose figures are there."""
    sections = {
        ("limits",): _limits,
        ("http", "limits"): _http,
        ("engine",): _engine,
        ("engine", "calibration"): _plan,
        ("growth",): _growth,
        ("front",): _front,
        ("peers",): _peers,
    }
    lines = ["# Measured by `make bench`", ""]
    for parts, section in sections.items():
        if all(part in results for part in parts):
            lines += [*section(results), ""]
    return "\n".join(lines)


def write_readme(results: dict[str, Any]) -> None:
    """The short table of the README, between its marks."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README} needs {BEGIN} and {END}")
    text = "\n".join(short(results))
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def short(results: dict[str, Any]) -> Iterator[str]:
    """Every precision as served in one process and over two shards, beside the other servers."""
    yield (
        f"Tokens a second over HTTP on 2 cores with kernels for {results['kernels']}, 1, 8 and 32 streams, greedy. "
        "`mid`: 4 layers of Qwen1.5-MoE-A2.7B's shape, 2.4 B parameters; `small`: 0.13 B. `bf16 activations`: with "
        "`--dtype bfloat16`, the arithmetic of the other servers. GB/s: what both cores could read right before and "
        "after; others share this machine's memory, so rows compare only as far as these agree."
    )
    yield ""
    rows = [
        [
            f"{one['shape']} {one['precision']}, {one['way']}",
            *(f"{one[column]:.0f}" for column in COLUMNS),
            f"{one['read_gb_s']:.0f}",
        ]
        for one in results["http"]
    ]
    others = [one for one in results.get("peers", ()) if "expertmesh" not in one["server"] and "why_not" not in one]
    for one in others:
        rates = [f"{one[column]:.0f}" if one.get(column) else "-" for column in COLUMNS]
        rows.append([f"{one['shape']} bf16, {one['server']}", *rates, f"{one['read_gb_s']:.0f}"])
    yield from table(("", "1", "8", "32", "prefill of 512", "GB/s"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _machine(one: dict[str, Any]) -> list[str]:
    return [f"{one['read_gb_s']:.0f}", f"{one['float32_gflop_s']:.0f}"]


def _limits(results: dict[str, Any]) -> Iterator[str]:
    yield f"## This machine in the same run ({results['measured']['limits']})"
    yield ""
    rows = [
        [str(one["threads"]), f"{one['read_gb_s']:.1f}", f"{one['float32_gflop_s']:.0f}", f"{one['int8_gop_s']:.0f}"]
        for one in results["limits"]
    ]
    yield from table(("threads", "read GB/s", "float32 GFLOP/s", "int8 GOP/s"), rows)


def _http(results: dict[str, Any]) -> Iterator[str]:
    yield "## Over HTTP, tokens a second"
    yield ""
    yield (
        "Greedy, prompts of 128 tokens (32 at batch 32). The last columns are what all cores could do right before "
        "and after these figures; in brackets the share of what that bandwidth allows, with two bytes for a bf16 "
        "weight (with AVX-512, ours take a byte and a half)."
    )
    yield ""
    rows = []
    for one in results["http"]:
        shape = shape_of(one["shape"], one["precision"])
        cells = [f"{one['shape']} {one['precision']}, {one['way']}"]
        for batch in (1, 8, 32):
            rate = one[f"b{batch}"]
            cells.append(f"{rate:.0f} ({rate / decode_limit(shape, batch, one['read_gb_s'] * 1e9):.2f})")
        rows.append([*cells, f"{one['prefill']:.0f}", *_machine(one)])
    yield from table(("model and way", *COLUMNS, *MACHINE), rows)
    yield ""
    peak = results["limits"][-1]["float32_gflop_s"] * 1e9
    for name in ("small", "mid"):
        limit = prefill_limit(shape_of(name, "bf16"), peak)
        yield f"Prefill of `{name}` by float32 computing alone: {limit:.0f} tokens a second at most."
    yield ""
    rows = []
    for precision, bars in BARS.items():
        ways = [one for one in results["http"] if one["shape"] == "mid" and one["precision"] == precision]
        for column, bar in zip(COLUMNS, bars, strict=True):
            best = max(ways, key=lambda one, column=column: one[column])
            met = "yes" if best[column] >= bar else "no"
            rows.append([f"`mid` {precision} {column}", str(bar), f"{best[column]:.0f}", best["way"], met])
    yield from table(("goal", "tokens/s", "best", "way", "met"), rows)
    for one in results["http"]:
        if one["clients"]:
            yield ""
            clients = one["clients"]
            yield (
                f"`small` {one['precision']}, 16 clients, {one['way']}: {clients['output_tok_s']:.0f} output tokens a "
                f"second, TTFT p50 {clients['ttft_p50_ms']:.0f} ms."
            )


def _engine(results: dict[str, Any]) -> Iterator[str]:
    engines = results["engine"]
    yield "## Where a step's time goes, ms"
    yield ""
    yield (
        "`experts` is what remains of the slowest shard's computing once the shared expert has hidden its part; "
        "`exchange` is all waiting and sending that no shard's computing explains; `HTTP` is the gap between tokens "
        "there less the step here."
    )
    for one in engines:
        if one["routers"] > 1 or one["shards"] not in (0, 2):
            continue
        yield ""
        where = place(one["shards"], one["routers"], one["threads"])
        yield f"`{one['shape']}` {one['precision']}, {where}"
        yield ""
        rows = []
        for batch, step in one["steps"].items():
            parts = step["parts"]
            cells = [batch, f"{step['step_ms']:.1f}", *(f"{parts[name]:.2f}" for name in PARTS)]
            served = _served(results, one)
            cells.append("-" if served is None else f"{1e3 * int(batch) / served[f'b{batch}'] - step['step_ms']:.2f}")
            rows.append(cells)
        yield from table(("batch", "step", *PARTS, "HTTP"), rows)
    yield ""
    yield "## The price of the mesh, `mid` int8, tokens a second of the engine"
    yield ""
    rows = []
    for one in engines:
        if one["shape"] != "mid" or one["precision"] != "int8":
            continue
        alone = {**one.get("alone_tok_s", {}), "prefill": one.get("alone_prefill")}
        cells = [place(one["shards"], one["routers"], one["threads"])]
        for name, rate in {**one["tok_s"], "prefill": one["prefill"]}.items():
            share = f" ({rate / alone[name]:.2f})" if rate and alone.get(name) else ""
            cells.append("-" if rate is None else f"{rate:.0f}{share}")
        rows.append([*cells, *_machine(one)])
    yield from table(("arrangement", *COLUMNS, *MACHINE), rows)
    yield ""
    yield (
        "In brackets the share of what the same engine did with all experts in its process and two threads, in turns "
        "with it: that process stays up meanwhile. With 2 routers each has the batch, so there are twice the sequences."
    )


def _served(results: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any] | None:
    way = {(2, 2): "2 shards", (0, 2): "local"}.get((engine["shards"], engine["threads"]), "")
    for one in results.get("http", ()):
        if (one["shape"], one["precision"], one["way"]) == (engine["shape"], engine["precision"], way):
            return dict(one)
    return None


def _plan(results: dict[str, Any]) -> Iterator[str]:
    yield "## `plan`: predicted and measured steps, ms"
    yield ""
    yield (
        "Calibrated with kernels alone and the model `thin` (tests/bench/calibration.py); none of these configurations "
        "went in."
    )
    yield ""
    rows = []
    compared = plan_accuracy.compare(results)
    for one in compared:
        name = f"`{one.shape}` {one.precision}, {one.where}, batch {one.batch}"
        rows.append([name, f"{one.predicted_ms:.1f}", f"{one.measured_ms:.1f}", f"{100 * one.error:+.0f} %"])
    yield from table(("configuration", "predicted", "measured", "error"), rows)
    within = sum(abs(one.error) <= plan_accuracy.WITHIN for one in compared)
    yield ""
    yield f"{within} of {len(compared)} are within {100 * plan_accuracy.WITHIN:.0f} %."


def _growth(results: dict[str, Any]) -> Iterator[str]:
    yield "## Cost as work grows, model `thin`"
    yield ""
    yield "Slope: exponent of the cost; 1 is linear, 2 quadratic. At the end: of the last two points."
    yield ""
    rows = []
    for name, one in results["growth"].items():
        points = ", ".join(f"{x}: {y:.3g}" for x, y in zip(one["x"], one["y"], strict=True))
        rows.append([f"{name} ({one['unit']})", points, f"{one['slope']:.2f}", f"{one['end']:.2f}"])
    yield from table(("what grows", "cost", "slope", "at the end"), rows)


def _front(results: dict[str, Any]) -> Iterator[str]:
    one = results["front"]
    yield f"## What the HTTP front adds, {one['streams']} streams, ms"
    yield ""
    rows = [
        [name, f"{one[f'link_{key}_p50_ms']:.1f}", f"{one[f'http_{key}_p50_ms']:.1f}", f"{one[f'added_{key}_ms']:+.2f}"]
        for name, key in (("TTFT p50", "ttft"), ("ITL p50", "itl"))
    ]
    yield from table(("", "straight to the router", "over HTTP", "added"), rows)


def _peers(results: dict[str, Any]) -> Iterator[str]:
    yield f"## Beside other servers, tokens a second (`make bench-peers`, {results['measured']['peers']})"
    yield ""
    rows = []
    for one in results["peers"]:
        rates = [f"{one[column]:.0f}" if one.get(column) else "-" for column in COLUMNS]
        machine = ["-"] * len(MACHINE) if "why_not" in one else _machine(one)
        rows.append([f"{one['shape']} bf16", one["server"], *rates, *machine])
    yield from table(("model", "server", *COLUMNS, *MACHINE), rows)
    for one in results["peers"]:
        if one.get("clients"):
            yield ""
            yield (
                f"{one['shape']}, 16 clients, {one['server']}: {one['clients']['output_tok_s']:.0f} output tokens a "
                f"second, TTFT p50 {one['clients']['ttft_p50_ms']:.0f} ms."
            )
        if one.get("why_not"):
            yield ""
            yield f"{one['server']}: not measured: {one['why_not']}"
