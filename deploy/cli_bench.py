"""`expertmesh bench`: load on a running service, and what it made of it. Flags as in `vllm bench serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deploy.bench_load import Workload, jobs
from deploy.cli_options import LOCAL_URL, ApiKey, Model, fail
from deploy.http_client import Client

WORDS = "the expert of a router goes to each shard and every token finds its way home again, over land and under sea: "


def bench(
    base_url: Annotated[
        str, typer.Option("--base-url", "--url", envvar="EXPERTMESH_URL", help="Where it is.")
    ] = LOCAL_URL,
    api_key: ApiKey = None,
    model: Model = None,
    dataset_name: Annotated[Literal["sharegpt", "random"], typer.Option(help="Lengths of requests.")] = "sharegpt",
    num_prompts: Annotated[int, typer.Option(help="Requests in all.")] = 100,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf sends all at once.")] = float("inf"),
    burstiness: Annotated[float, typer.Option(help="1: Poisson; above: more even; inf: fixed gaps.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    random_input_len: Annotated[int, typer.Option(help="Prompt tokens, for random.")] = 128,
    random_output_len: Annotated[int, typer.Option(help="Output tokens, for random.")] = 64,
    random_range_ratio: Annotated[float, typer.Option(help="Lengths vary by this share, for random.")] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(help="Tokens that prompts share at their beginning.")] = 0,
    num_prefixes: Annotated[int, typer.Option(help="How many such beginnings there are.")] = 1,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Write all tokens asked for.")
    ] = True,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    metric_percentiles: Annotated[str, typer.Option(help="Which to show.")] = "50,90,99",
    result_dir: Annotated[Path, typer.Option(help="Where the JSON and the plot go.")] = Path("bench-out"),
    result_filename: Annotated[str | None, typer.Option(help="Name of the JSON; the plot is beside it.")] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw a PNG (extra `bench`).")] = True,
) -> None:
    """Send a load, print TTFT, ITL, E2E and throughput, write JSON and a plot."""
    from deploy.bench import Target, run, summarize

    client = Client(url=base_url, api_key=api_key)
    percents = _percents(metric_percentiles)
    if result_filename is not None and result_filename.endswith(".png"):
        fail(f"--result-filename is {result_filename}, which the plot would overwrite; end it in .json")
    workload = Workload(
        num_prompts=num_prompts,
        rate=None if request_rate == float("inf") else request_rate,
        burstiness=None if burstiness == float("inf") else burstiness,
        dataset=dataset_name,
        input_len=random_input_len,
        output_len=random_output_len,
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        num_prefixes=num_prefixes,
        seed=seed,
    )
    cards = client.get("/v1/models")["data"]
    card = next((c for c in cards if c["id"] == model), None) if model else cards[0]
    if card is None:
        fail(f"model {model!r} is not served; there are {', '.join(c['id'] for c in cards)}")
    vocabulary = sorted(set(client.post("/tokenize", {"prompt": WORDS, "model": card["id"]})["tokens"]))
    work = jobs(workload, vocabulary, int(card["max_model_len"]))
    body: dict[str, Any] = {"temperature": temperature, "ignore_eos": ignore_eos}
    target = Target(url=base_url, model=card["id"], api_key=api_key, max_concurrency=max_concurrency, body=body)
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("requests", total=len(work))
        outcomes, duration_s = asyncio.run(run(work, target, progress=lambda done: bar.update(task, completed=done)))
    summary = summarize(outcomes, duration_s, percents)
    show(summary, percents)
    stem = result_filename or f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path = result_dir / stem
    result_dir.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(workload, name) for name in Workload.__dataclass_fields__} | {
        "model": card["id"],
        "max_concurrency": max_concurrency,
        **body,
    }
    path.write_text(json.dumps({"workload": asked, **summary}, indent=1), encoding="utf-8")
    typer.echo(f"wrote {path}")
    if plot:
        try:
            from deploy.bench_plot import draw
        except ImportError:
            typer.echo("no plot: it needs the extra, pip install 'expertmesh[bench]'")
        else:
            draw(outcomes, summary, path.with_suffix(".png"))
            typer.echo(f"wrote {path.with_suffix('.png')}")
    if summary["failed"]:
        fail(f"{summary['failed']} requests failed: {summary['errors'][0]}")


def _percents(text: str) -> list[float]:
    percents: list[float] = []
    with contextlib.suppress(ValueError):
        percents = [float(part) for part in text.split(",")]
    if not percents or not all(0 <= percent <= 100 for percent in percents):
        fail(f"--metric-percentiles is {text!r}; it must be numbers from 0 to 100, with commas between them")
    return percents


def show(summary: dict[str, Any], percents: Sequence[float]) -> None:
    from rich.console import Console
    from rich.table import Table

    screen = Console(highlight=False)
    screen.print(
        f"{summary['completed']} requests in {summary['duration']:.1f} s: "
        f"{summary['request_throughput']:.2f} requests/s, "
        f"[bold]{summary['output_throughput']:.1f}[/bold] output tokens/s, "
        f"{summary['total_token_throughput']:.1f} tokens/s in all",
        soft_wrap=True,
    )
    table = Table(box=None, header_style="dim")
    for name in ("ms", "mean", *(f"p{p:g}" for p in percents)):
        table.add_column(name, justify="left" if name == "ms" else "right")
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E")):
        keys = [f"mean_{name}_ms", *(f"p{p:g}_{name}_ms" for p in percents)]
        table.add_row(label, *("-" if summary[k] is None else f"{summary[k]:.1f}" for k in keys))
    screen.print(table)
