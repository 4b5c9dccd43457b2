"""`expertmesh chat` and `expertmesh complete`: the service from a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from deploy.cli_options import LOCAL_URL, ApiKey, MaxTokens, Model, Seed, Temperature, TopP, Url
from deploy.http_client import CallError, Client

HELP = """/reset          forget the conversation
/system TEXT    change the system prompt (and forget the conversation)
/history        show the conversation
/retry          answer the last message again
/quit           end (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass(slots=True)
class Conversation:
    """History and settings of one chat; no terminal in here."""

    client: Client
    model: str
    sampling: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        self.messages.clear()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer. What has come when the caller leaves early stays in the history; a question that
        failed does not. Raises CallError."""
        self.messages.append({"role": "user", "content": text})
        head = [{"role": "system", "content": self.system}] if self.system else []
        answer, failed = "", False
        body = {"model": self.model, "messages": [*head, *self.messages], **self.sampling}
        try:
            for event in self.client.stream("/v1/chat/completions", body):
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content")
                    if piece:
                        answer += piece
                        yield piece
        except CallError:
            failed = True
            raise
        finally:
            if failed or not answer:
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": answer})

    def take_back(self) -> str | None:
        """Drop the last exchange; its question."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None


def chat(
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    model: Model = None,
    system_prompt: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Talk with the model. /help shows the commands; Ctrl-C stops an answer."""
    client = Client(url=url, api_key=api_key)
    name = model or client.first_model()
    sampling = sampling_fields(max_tokens, temperature, top_p, seed)
    conversation = Conversation(client, name, sampling, system_prompt)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and the up arrow)

        typer.secho(f"{name} at {url}; /help for commands, Ctrl-D ends it", dim=True)
    converse(conversation, lambda: input("> " if sys.stdin.isatty() else ""), _show)


def converse(conversation: Conversation, read: Callable[[], str], show: Callable[[str], None]) -> None:
    """Read, answer, until the input ends or /quit."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            show("\n")
            continue
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/retry":
            line = conversation.take_back() or ""
        elif command.startswith("/"):
            show(_obey(conversation, command, rest.strip()) + "\n")
            continue
        if line:
            _answer(conversation, line, show)


def _obey(conversation: Conversation, command: str, rest: str) -> str:
    if command == "/reset":
        conversation.reset()
        return "forgotten"
    if command == "/system":
        conversation.system = rest or None
        conversation.reset()
        return f"system prompt: {rest}" if rest else "no system prompt"
    if command == "/history":
        return "\n".join(f"{m['role']}: {m['content']}" for m in conversation.messages) or "nothing yet"
    return HELP if command == "/help" else f"{command} is no command\n{HELP}"


def _answer(conversation: Conversation, line: str, show: Callable[[str], None]) -> None:
    pieces = conversation.ask(line)
    began = time.monotonic()
    try:
        for piece in pieces:
            show(piece)
        show("\n")
    except KeyboardInterrupt:
        pieces.close()  # ends the request too
        show(f"\n[stopped after {time.monotonic() - began:.1f} s]\n")
    except CallError as error:
        show(f"\n[error: {error}]\n")


def complete(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to go on from; '-' or nothing reads standard input.")
    ] = None,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    model: Model = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; may be repeated.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt too.")] = False,
) -> None:
    """Continue a text, as it is written."""
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    client = Client(url=url, api_key=api_key)
    body = {"prompt": text, "echo": echo, **sampling_fields(max_tokens, temperature, top_p, seed)}
    if stop:
        body["stop"] = stop
    try:
        body["model"] = model or client.first_model()
        for event in client.stream("/v1/completions", body):
            for choice in event.get("choices", ()):
                _show(choice["text"])
        _show("\n")
    except KeyboardInterrupt:
        _show("\n")


def sampling_fields(
    max_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    """Only what was given, so that the model's own defaults hold."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    return {name: value for name, value in given.items() if value is not None}


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
