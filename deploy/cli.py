"""The `expertmesh` command. Only what a command needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deploy import cli_bench, cli_chat, cli_check, cli_down, cli_mesh, cli_plan, cli_status
from deploy.cli_options import fail
from deploy.http_client import LOOPBACK, CallError
from deploy.launch import StartError, running, wait_for_interrupt
from deploy.listener import shown


class Commands(TyperGroup):
    """What a person, a file or the service got wrong ends a command with one red line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, CallError, StartError) as error:
            fail(str(error))


cli = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    help="Serve Qwen2-MoE models: routers run attention, shards hold experts, and a dead part costs a pause.",
    pretty_exceptions_enable=False,
)


# Flags whose setting has another name than theirs; all others are called as the last part of a setting's name.
_NAMED_OTHERWISE = {
    "model": "model.path",
    "served_model_name": "model.served_names",
    "api_key": "server.api_keys",
}


# What to send first, by the plainest endpoint of a model.
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "What does ocean mean?"}]},
    "/v1/embeddings": {"input": "The sea is calm."},
    "/classify": {"input": "The sea is calm."},
    "/hf/token-classification": {"inputs": "Ishmael went to sea."},
    "/hf/question-answering": {"inputs": {"question": "Who went to sea?", "context": "Ishmael went to sea."}},
}


@cli.command()
def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Directory, Hugging Face hub id, or nothing for the demo.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (YAML).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    shards: Annotated[int | None, typer.Option(help="Processes that hold experts.")] = None,
    routers: Annotated[int | None, typer.Option(help="Processes that run attention.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of each expert.")] = None,
    spares: Annotated[int | None, typer.Option(help="Empty shards, ready to take over.")] = None,
    transport: Annotated[str | None, typer.Option(help="auto, star, all_to_all or host.")] = None,
    local: Annotated[
        bool | None, typer.Option("--local", help="All in one process per router, no shards: for one GPU or CPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of a router; its part of the cores that shards leave, unless told.")
    ] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name in the API; may be repeated.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Key that clients must show; may be repeated.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File with such keys, one a line.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16, or bfloat16: activations too.")] = None,
    quantization: Annotated[str | None, typer.Option(help="int8 or int4, while loading.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and output.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in one step.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens in one step.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a KV block.")] = None,
    kv_cache_bytes: Annotated[str | None, typer.Option(help="KV cache of a router at most: 16GiB, say.")] = None,
    num_kv_blocks: Annotated[int | None, typer.Option(help="KV blocks of a router.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of requests that bring none.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="File with another chat template.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="Where hub files go.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text, or json: one object a line, from every part.")] = None,
    otlp_traces_endpoint: Annotated[str | None, typer.Option(help="URL to send OpenTelemetry traces to.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show every setting and its source.")] = False,
) -> None:
    """Start the service on this machine and run until Ctrl-C."""
    from deploy.settings import field_names, load

    by_field = {name.partition(".")[2]: name for name in field_names()}
    flags = {
        _NAMED_OTHERWISE.get(name) or by_field[name]: value
        for name, value in context.params.items()
        if name not in ("config", "print_config") and value not in ([], ())  # what may be repeated and is not there
    }
    loaded = load(file=config, environ=os.environ, flags=flags)
    if print_config:
        rows = loaded.explain()
        width = max(len(name) for name, _, _ in rows)
        for name, value, source in rows:
            typer.echo(f"{name:{width}} {value!r:28} {source}")
        return
    _serve(loaded.settings)


def _serve(settings: Any) -> None:
    from deploy.auth import all_keys
    from deploy.service_record import recorded

    keys = all_keys(settings.server.api_keys, settings.server.api_key_file)
    say = _speaker(settings.server.log_format)
    if not keys and settings.server.host not in LOOPBACK:
        place = shown(settings.server.host, settings.server.port)
        say(f"whoever reaches {place} may use it: there is no --api-key-file")
    try:
        with running(settings, say) as service, recorded(service.url, settings.server.port):
            key, in_text = keys[0] if keys else None, settings.server.log_format == "text"
            _greet(service, say, key, in_text)
            _wait(service, key, in_text)
            say("stopping")
    except KeyboardInterrupt:
        fail("interrupted before the service was up")


def _speaker(log_format: Any) -> Callable[[str], None]:
    """How progress is told: lines with the time since the start, or lines of the log."""
    if log_format == "json":
        from actors.logs import start_logging

        start_logging("serve", "json")
        return logging.getLogger("expertmesh.serve").info
    from rich.console import Console

    screen, began = Console(stderr=True, highlight=False), time.monotonic()
    return lambda line: screen.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}")


def _greet(service: Any, say: Callable[[str], None], api_key: str | None, at_length: bool) -> None:
    """Print what to try. Where the model writes text, answer one token first, so that the time to it is a fact."""
    from deploy.http_client import Client

    path, speed = service.endpoints[0], f"ready after {service.start_s:.1f} s"
    writes_text = "/v1/completions" in service.endpoints
    if writes_text:
        began = time.monotonic()
        first = {"model": service.model, "prompt": "The", "max_tokens": 1}
        Client(url=service.url, api_key=api_key, direct=True).post("/v1/completions", first)
        speed = f"start to first token: {service.start_s + time.monotonic() - began:.1f} s"
    facts = f"serving {service.model} at {service.url}  ({speed})"
    if not at_length:
        say(facts)
        return
    body = json.dumps({"model": service.model, **EXAMPLES[path]})
    typer.secho(facts, fg=typer.colors.GREEN, bold=True, err=True)
    headers = ["Content-Type: application/json"]
    if api_key is not None:
        headers.append("Authorization: Bearer $EXPERTMESH_API_KEY")
    typer.echo("try:" if api_key is None else "try, with a key in EXPERTMESH_API_KEY:", err=True)
    lines = [f"curl {service.url}{path}", *(f'-H "{header}"' for header in headers), f"-d '{body}'"]
    typer.echo("  " + " \\\n    ".join(lines), err=True)
    chat = f"expertmesh chat --url {service.url}    or " if writes_text else ""
    typer.echo(f"  {chat}{service.url}/ in a browser; Ctrl-C ends it", err=True)


def _wait(service: Any, api_key: str | None, in_text: bool) -> None:
    """Until Ctrl-C; at a terminal with a status line."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from deploy.cli_status import look, one_line
    from deploy.http_client import Client

    screen = Console(stderr=True, highlight=False)
    if not (in_text and screen.is_terminal):
        wait_for_interrupt()
        return
    client = Client(url=service.url, api_key=api_key, timeout_s=5.0, direct=True)
    with Live(console=screen, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
        before = None

        def tell() -> None:
            nonlocal before
            try:
                now = look(client, None)
                line, before = one_line(before or now, now), now
            except CallError as error:
                line = str(error)
            live.update(Text(line, style="dim"), refresh=True)

        wait_for_interrupt(tell)


for _command in (
    cli_chat.chat,
    cli_chat.complete,
    cli_status.status,
    cli_check.check,
    cli_bench.bench,
    cli_plan.plan,
    cli_mesh.scale,
    cli_down.down,
):
    cli.command()(_command)


def main() -> None:
    """Entry point."""
    cli()


if __name__ == "__main__":
    main()
