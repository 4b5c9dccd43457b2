"""A tiny checkpoint without weights, fake routers on real sockets with the real wire, and the API behind uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from actors.request import rows_to_wire
from deploy.ingress import create_api
from deploy.router_pool import RouterPool
from deploy.served_model import ServedModel
from deploy.settings import Settings

CHAT_TEMPLATE = """{%- if tools %}
<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}

<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the expert goes to the router and the shard answers, over and over again"] * 4, trainer
    )
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    return tokenizer


def token_at(seed: int, position: int) -> int:
    """What a fake router draws: printable single bytes, from the seed and the position alone."""
    return 3 + (seed * 31 + position * position * 7 + position) % 90


Script = Callable[[dict[str, Any]], list[int] | None]


@dataclass
class FakeRouter:
    """Speaks the routers' side of the wire. `script` may say the output tokens of a request; else `token_at` does."""

    router_id: str = "router-0"
    script: Script = lambda message: None
    token_s: float = 0.0
    max_running: int = 10_000
    dies_after: int | None = None  # tokens in all; then the connection is cut in the middle of a line
    says_hello: bool = True
    is_silent: bool = False
    is_ready: bool = True
    port: int = 0
    models: list[str] = field(default_factory=lambda: ["tiny"])
    token: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    num_tokens: int = 0
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    server: asyncio.Server | None = None

    async def start(self) -> FakeRouter:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 26)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [self.entry]

    @property
    def entry(self) -> dict[str, Any]:
        return {"router_id": self.router_id, "host": "127.0.0.1", "port": self.port}

    def kill(self) -> None:
        """As SIGKILL would: nothing more is said, every socket is gone."""
        if self.server is not None:
            self.server.close()
        for task in self.running.values():
            task.cancel()
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        hello = json.loads(await reader.readline())
        if hello["token"] != self.token or not self.says_hello:
            if self.says_hello:
                writer.close()
            return
        self._send(writer, {"op": "hello", "router_id": self.router_id, "models": self.models})
        load = asyncio.create_task(self._report(writer))
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message["op"] == "generate":
                    self.requests.append(message)
                    self.running[message["request_id"]] = asyncio.create_task(self._generate(writer, message))
                elif message["op"] == "pool":
                    self.requests.append(message)
                    self._pool(writer, message["request_id"])
                elif message["op"] == "command":
                    self.commands.append(message["name"])
                    self._chunk(writer, message["request_id"], [], finish_reason="stop", result={"ok": True})
                elif message["op"] == "abort":
                    self.aborted.append(message["request_id"])
                    if (task := self.running.pop(message["request_id"], None)) is not None:
                        task.cancel()
        except ConnectionError:
            pass
        finally:
            load.cancel()

    async def _report(self, writer: asyncio.StreamWriter) -> None:
        while True:
            if not self.is_silent:
                load = {"running": len(self.running), "waiting": 0, "kv_usage": 0.0, "ready": self.is_ready}
                self._send(writer, {"op": "load", **load})
            await asyncio.sleep(0.05)

    def _pool(self, writer: asyncio.StreamWriter, request_id: str) -> None:
        self._chunk(writer, request_id, [], finish_reason="stop", values=rows_to_wire(np.float32([[1.0, 2.0]])))

    async def _generate(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        request_id, sampling = message["request_id"], message["sampling"]
        if len(self.running) > self.max_running:
            error = {"status": 503, "code": "queue_full", "message": "the queue is full"}
            self._chunk(writer, request_id, [], finish_reason="error", error=error)
            self.running.pop(request_id, None)
            return
        script = self.script(message)
        limit = sampling["max_tokens"]
        if script is not None:
            limit = min(limit, len(script))
        extra: dict[str, Any] = {"num_cached_tokens": 1}
        if sampling.get("prompt_logprobs") is not None:
            extra["prompt_logprobs"] = [None, *(self._alternatives(t, 1) for t in message["prompt_ids"][1:])]
        for i in range(len(message["output_ids"]), limit):
            await asyncio.sleep(self.token_s)
            position = len(message["prompt_ids"]) + i
            token = script[i] if script is not None else token_at(sampling.get("seed", 0), position)
            self.num_tokens += 1
            if self.dies_after is not None and self.num_tokens > self.dies_after:
                writer.write(b'{"op":"chunks","chunks":[{"request_id":"' + request_id.encode() + b'","token_ids":[7,7,')
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                self.kill()
                return
            is_stop = token == 2 or token in sampling.get("stop_token_ids", [])
            if sampling.get("logprobs") is not None:
                extra["logprobs"] = [self._alternatives(token, sampling["logprobs"])]
            if is_stop or i == limit - 1:
                extra["finish_reason"] = (
                    "stop" if is_stop or (script is not None and limit == len(script)) else "length"
                )
                extra["stop_reason"] = token if is_stop and token != 2 else None
                self.running.pop(request_id, None)
            self._chunk(writer, request_id, [token], **extra)
            extra = {}
            if is_stop:
                return

    def _alternatives(self, token: int, num: int) -> list[list[float]]:
        return [[token, -0.5, 1], *([token + i - 1, -0.5 * i, i] for i in range(1, num + 1))]

    def _chunk(self, writer: asyncio.StreamWriter, request_id: str, token_ids: list[int], **extra: Any) -> None:
        self._send(writer, {"op": "chunks", "chunks": [{"request_id": request_id, "token_ids": token_ids, **extra}]})

    def _send(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        if not writer.is_closing():
            writer.write(json.dumps(message).encode() + b"\n")


def num_in_flight(pool: RouterPool) -> int:
    return sum(link.num_open for link in pool.links)


@dataclass
class RunningApi:
    """The API on a loopback port, with its event loop in a thread of its own."""

    url: str
    router: Any  # FakeRouter, or whatever has start, entries and kill
    pool: RouterPool
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def running_api(
    served: ServedModel | Sequence[ServedModel], settings: Settings | None = None, router: Any = None
) -> Iterator[RunningApi]:
    router = router or FakeRouter()
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        await router.start()

        async def discover() -> list[dict[str, Any]]:
            return router.entries

        chosen = settings or Settings()
        mesh = chosen.mesh.model_copy(update={"discover_interval_s": 0.05})
        limits = chosen.limits.model_copy(update={"router_wait_s": 1.0})
        pool = RouterPool(discover, chosen.model_copy(update={"mesh": mesh, "limits": limits}))
        api = create_api(chosen, [served] if isinstance(served, ServedModel) else served, pool)
        server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="warning"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        found.update(url=f"http://127.0.0.1:{port}", pool=pool, server=server, loop=asyncio.get_running_loop())
        ready.set()
        await task
        router.kill()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield RunningApi(found["url"], router, found["pool"], found["loop"])
    finally:
        found["server"].should_exit = True
        found["server"].force_exit = True
        thread.join(10)
