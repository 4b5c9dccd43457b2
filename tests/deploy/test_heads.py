"""Classification, pooling, embeddings and scores over a real router, against transformers' models."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from deploy import huggingface
from deploy.errors import ContextTooLong, InvalidRequest
from deploy.label_likelihood import label_log_likelihoods
from deploy.openai_requests import parse
from deploy.placed_tokens import place_tokens
from deploy.score import ScoreRequest, score
from deploy.served_model import ModelList
from deploy.service import Service
from deploy.settings import Settings
from tests.deploy.fakes import RunningApi, running_api
from tests.deploy.tiny_heads import TAGS, TOPICS, TinyHeads, likelihood, write_tiny_heads

TEXTS = [
    "the whale",
    "a",
    "The ship and the storm went over the sea to Paris, and the whale swam there. " * 2,
    "Zoe\u0308 🙂 saw the 한국 whale\n and the sea.",
    "the whale",
]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> TinyHeads:
    return write_tiny_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def api(heads: TinyHeads) -> Iterator[RunningApi]:
    settings = Settings.model_validate({"mesh": {"token": "t"}, "limits": {"max_prompts": 200}})
    with running_api(heads.served, settings, heads.router()) as running:
        yield running


def post(api: RunningApi, path: str, **body: Any) -> Any:
    """The answer, or (status, error) of a refusal."""
    request = urllib.request.Request(api.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def ids_of(heads: TinyHeads, text: str) -> list[int]:
    ids: list[int] = heads.tokenizer(text)["input_ids"]
    return ids


def is_close(found: Any, expected: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor(found, dtype=torch.float64), expected.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "function"),
    [
        ("topics", lambda x: x.softmax(-1)),
        ("flags", lambda x: x.sigmoid()),
        ("rating", lambda x: x),
        ("judge", lambda x: x.sigmoid()),
    ],
)
def test_classify_gives_the_probabilities_of_transformers(
    api: RunningApi, heads: TinyHeads, model: str, function: Any
) -> None:
    answer = post(api, "/classify", model=model, input=TEXTS)
    assert answer["object"] == "list" and answer["model"] == model and answer["id"].startswith("classify-")
    num_tokens = sum(len(ids_of(heads, text)) for text in TEXTS)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == num_tokens
    for index, (item, text) in enumerate(zip(answer["data"], TEXTS, strict=True)):
        expected = function(heads.outputs(model, ids_of(heads, text)))
        assert is_close(item["probs"], expected)
        labels = heads.oracles[model].config.id2label
        assert (item["index"], item["label"], item["num_classes"]) == (
            index,
            labels[int(expected.argmax())],
            len(expected),
        )
    raw = post(api, "/classify", model=model, input=TEXTS[0], use_activation=False)["data"][0]["probs"]
    assert is_close(raw, heads.outputs(model, ids_of(heads, TEXTS[0])))


def test_a_batch_of_mixed_lengths_answers_as_one_by_one(api: RunningApi) -> None:
    for path, body in (("/classify", {}), ("/v1/embeddings", {}), ("/pooling", {"task": "token_classify"})):
        together = post(api, path, input=TEXTS, **body)["data"]
        alone = [post(api, path, input=text, **body)["data"][0] for text in TEXTS]
        assert [{**one, "index": 0} for one in together] == alone


def test_token_ids_are_read_as_texts_are(api: RunningApi, heads: TinyHeads) -> None:
    ids = ids_of(heads, TEXTS[0])
    answers = [post(api, "/classify", input=value)["data"][0]["probs"] for value in (TEXTS[0], [TEXTS[0]], ids, [ids])]
    assert all(answer == answers[0] for answer in answers)
    kept = post(api, "/classify", input=TEXTS[2], truncate_prompt_tokens=5)
    assert kept["usage"]["prompt_tokens"] == 5
    assert kept["data"][0]["probs"] == post(api, "/classify", input=ids_of(heads, TEXTS[2])[-5:])["data"][0]["probs"]


def test_embeddings_are_the_last_hidden_state_at_length_one(api: RunningApi, heads: TinyHeads) -> None:
    client = openai.OpenAI(base_url=api.url + "/v1", api_key="x", max_retries=0)
    for encoding_format in ("float", "base64", None):  # the client asks for base64 by itself, and decodes it
        extra: Any = {} if encoding_format is None else {"encoding_format": encoding_format}
        answer = client.embeddings.create(model="tiny", input=TEXTS, **extra)
        for item, text in zip(answer.data, TEXTS, strict=True):
            expected = torch.nn.functional.normalize(heads.hidden(ids_of(heads, text))[-1], dim=-1)
            vector: Any = item.embedding
            if encoding_format == "base64":
                raw = base64.b64decode(vector)
                vector = struct.unpack(f"<{len(raw) // 4}f", raw)
            assert is_close(vector, expected)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    raw_vector = post(api, "/v1/embeddings", input="the whale", use_activation=False)["data"][0]["embedding"]
    assert is_close(raw_vector, heads.hidden(ids_of(heads, "the whale"))[-1])
    status, error = post(api, "/v1/embeddings", input="x", dimensions=8)
    assert status == 400 and error["param"] == "dimensions"


def test_pooling_does_each_task(api: RunningApi, heads: TinyHeads) -> None:
    ids = ids_of(heads, TEXTS[3])
    tagged = post(api, "/pooling", task="token_classify", input=TEXTS[3])
    assert tagged["model"] == "entities" and tagged["data"][0]["object"] == "pooling"
    assert is_close(tagged["data"][0]["data"], heads.outputs("entities", ids).softmax(-1))
    assert post(api, "/pooling", model="entities", input=TEXTS[3])["data"] == tagged["data"]
    assert len(tagged["data"][0]["data"][0]) == len(TAGS)
    classified = post(api, "/pooling", task="classify", model="topics", input=TEXTS[3])["data"][0]["data"]
    assert is_close(classified, heads.outputs("topics", ids).softmax(-1)) and len(classified) == len(TOPICS)
    hidden = torch.nn.functional.normalize(heads.hidden(ids), dim=-1)
    assert is_close(post(api, "/pooling", task="embed", input=TEXTS[3])["data"][0]["data"], hidden[-1])
    assert is_close(post(api, "/pooling", task="token_embed", input=TEXTS[3])["data"][0]["data"], hidden)
    status, error = post(api, "/pooling", task="token_classify", model="tiny", input="x")
    assert status == 400 and "/v1/embeddings" in error["message"]


def test_rows_that_several_steps_made_are_whole_and_exact(api: RunningApi, heads: TinyHeads) -> None:
    ids = [(7 * i) % 250 + 3 for i in range(200)]  # three steps and a bit
    raw = post(api, "/pooling", task="token_embed", input=ids, use_activation=False)["data"][0]["data"]
    assert is_close(raw, heads.hidden(ids))
    assert torch.tensor(raw, dtype=torch.float64).equal(torch.tensor(raw).double()), "each is a float32"
    packed = post(api, "/pooling", task="token_embed", input=ids, use_activation=False, encoding_format="base64")
    assert [[*struct.unpack("<64f", base64.b64decode(row))] for row in packed["data"][0]["data"]] == raw


def test_scores_compare_embeddings_or_come_from_a_judge(api: RunningApi, heads: TinyHeads) -> None:
    hidden = [torch.nn.functional.normalize(heads.hidden(ids_of(heads, text))[-1], dim=-1) for text in TEXTS[:3]]
    for path in ("/score", "/v1/score"):
        answer = post(api, path, model="tiny", text_1=TEXTS[0], text_2=TEXTS[1:3])
        assert is_close([item["score"] for item in answer["data"]], torch.stack([hidden[0] @ h for h in hidden[1:]]))
    judged = post(api, "/score", model="judge", text_1=TEXTS[:2], text_2=TEXTS[1:3])["data"]
    for item, first, second in zip(judged, TEXTS[:2], TEXTS[1:3], strict=True):
        ids = heads.tokenizer(first, second)["input_ids"]
        assert is_close([item["score"]], heads.outputs("judge", ids).sigmoid())
    assert post(api, "/score", text_1=TEXTS[:2], text_2=TEXTS[:3])[0] == 400
    assert len(post(api, "/score", text_1="a", text_2=["b"] * 200)["data"]) == 200  # all that max_prompts allows
    status, error = post(api, "/score", model="topics", text_1="a", text_2="b")
    assert status == 400 and "/classify" in error["message"]


def test_a_long_pair_loses_the_end_of_its_second_text(api: RunningApi, heads: TinyHeads) -> None:
    question, text = "the whale?", "The sea and the ship went over to Paris. " * 40
    for keep, num_kept in ((40, 40), (-1, 256)):
        ids = heads.tokenizer(question, text, truncation="only_second", max_length=num_kept)["input_ids"]
        answer = post(api, "/score", model="judge", text_1=question, text_2=text, truncate_prompt_tokens=keep)
        assert answer["usage"]["prompt_tokens"] == len(ids) == num_kept
        assert is_close([answer["data"][0]["score"]], heads.outputs("judge", ids).sigmoid())
    whole = post(api, "/score", model="judge", text_1=question, text_2="the sea", truncate_prompt_tokens=40)
    assert whole["data"] == post(api, "/score", model="judge", text_1=question, text_2="the sea")["data"]
    status, error = post(api, "/score", model="judge", text_1=text, text_2="the sea", truncate_prompt_tokens=40)
    assert status == 400 and error["param"] == "truncate_prompt_tokens" and "text_1" in error["message"]


class Untouched:
    """A tokenizers.Tokenizer that isn't asked for tokens."""


@pytest.mark.parametrize(
    "ask",
    [
        lambda service, text: score(
            service, parse({"model": "judge", "text_1": "a", "text_2": text}, ScoreRequest), ""
        ),
        lambda service, text: huggingface.token_classification(
            service, parse({"inputs": text, "parameters": {"stride": 9}}, huggingface.HuggingFaceBody), None
        ),
        lambda service, text: huggingface.question_answering(
            service, parse({"inputs": {"question": "a", "context": text}}, huggingface.HuggingFaceBody), None
        ),
    ],
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(heads: TinyHeads, ask: Any) -> None:
    models = heads.served
    for model in models:
        model.tokenizer.backend = Untouched()  # type: ignore[assignment]
    limited = Settings.model_validate({"limits": {"max_prompts": 2}})
    service = Service(limited, ModelList(models), None)  # type: ignore[arg-type]

    async def run() -> None:
        with pytest.raises(ContextTooLong):
            await ask(service, "a" * 100_000)
        service.close()

    asyncio.run(run())


def test_tokens_are_placed_with_the_interpreter_free_for_others(heads: TinyHeads) -> None:
    class Batches:
        """As long as they tokenize, the library's other ways keep every other thread waiting."""

        encode_batch = heads.served[0].tokenizer.backend.encode_batch

    tokenizer = heads.served[0].tokenizer
    tokenizer.backend = Batches()  # type: ignore[assignment]
    for pair in (None, "and the sea"):
        found = [token.token_id for token in place_tokens(tokenizer, "the whale", pair)]
        assert found == heads.tokenizer("the whale", pair)["input_ids"]


def test_a_causal_model_classifies_by_the_likelihood_of_labels(api: RunningApi, heads: TinyHeads) -> None:
    def num_finished() -> int:
        metrics = httpx.get(api.url + "/metrics").text
        return int(float(metrics.split('request_success_total{finished_reason="stop"} ')[1].split()[0]))

    labels, before = ["whale", "ship", "storm over the sea"], num_finished()
    answer = post(api, "/classify", model="tiny", input=TEXTS[:3], labels=labels)
    for item, text in zip(answer["data"], TEXTS, strict=False):
        scores = [likelihood(heads, ids_of(heads, text), " " + label) for label in labels]
        expected = torch.tensor(scores).softmax(-1)
        assert is_close(item["probs"], expected) and item["label"] == labels[int(expected.argmax())]
    assert post(api, "/classify", input="x", labels=["a"], label_template="no place")[0] == 400
    assert num_finished() == before + 3 * len(labels)
    status, error = post(api, "/classify", model="topics", input="x", labels=["a", "b"])
    assert status == 400 and "classification by `labels`" in error["message"]


def test_labels_are_tokenized_beside_the_event_loop_until_one_cannot_fit(heads: TinyHeads) -> None:
    model = heads.served[0]
    threads: list[str] = []

    class Recorded:
        def __init__(self, backend: Any) -> None:
            self._backend = backend

        def encode_batch_fast(self, *arguments: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            return self._backend.encode_batch_fast(*arguments, **options)

    model.tokenizer.backend = Recorded(model.tokenizer.backend)  # type: ignore[assignment]
    service = Service(Settings(), ModelList([model]), None)  # type: ignore[arg-type]

    async def refused(num_labels: int, template: str) -> InvalidRequest:
        labels = [f"{i}" for i in range(num_labels)]
        with pytest.raises(InvalidRequest) as caught:
            await label_log_likelihoods(service, model, [[5]], labels, template)
        return caught.value

    async def run() -> tuple[InvalidRequest, InvalidRequest]:
        return await refused(100, "word " * 1000 + "{}"), await refused(1000, "word " * 1900 + "{}")

    too_long, too_many = asyncio.run(run())
    assert isinstance(too_long, ContextTooLong) and too_long.param == "labels"
    assert len(threads) == 1 and threads[0].startswith("read")
    assert too_many.param == "labels" and "characters" in too_many.message
    full = [[5] * model.max_model_len]
    with pytest.raises(ContextTooLong) as text_too_long:
        asyncio.run(label_log_likelihoods(service, model, full, ["a"], "{}", names=("inputs", "labels")))
    assert text_too_long.value.param == "inputs"
    service.close()


def test_a_model_of_another_task_is_refused_with_where_to_go(api: RunningApi) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", {"model": "topics", "messages": [{"role": "user", "content": "x"}]}, "/classify"),
        ("/v1/completions", {"model": "entities", "prompt": "x"}, "/hf/token-classification"),
        ("/v1/embeddings", {"model": "answers", "input": "x"}, "/hf/question-answering"),
        ("/classify", {"model": "tiny", "input": "x"}, "/v1/chat/completions"),
        ("/classify", {"model": "entities", "input": "x"}, "/hf/token-classification"),
    ]
    for path, body, remedy in cases:
        status, error = post(api, path, **body)
        assert status == 400 and error["code"] == "wrong_task" and remedy in error["message"], (path, error)
    status, message = post(api, "/hf/question-answering/topics", inputs={"question": "a", "context": "b"})
    assert status == 400 and "/classify" in message
    status, error = post(api, "/classify", model="nobody", input="x")
    assert status == 404 and "topics" in error["message"]


ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/hf/text-generation": {"inputs": "x", "parameters": {"max_new_tokens": 2}},
    "/hf/zero-shot-classification": {"inputs": "x", "parameters": {"candidate_labels": ["a", "b"]}},
    "/v1/embeddings": {"input": "x"},
    "/pooling": {"input": "x"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/classify": {"input": "x"},
    "/hf/text-classification": {"inputs": "x"},
    "/hf/token-classification": {"inputs": "x"},
    "/hf/question-answering": {"inputs": {"question": "a", "context": "b"}},
}


def test_each_model_is_served_where_it_says_and_every_other_endpoint_says_where(
    api: RunningApi, heads: TinyHeads
) -> None:
    for model, (path, body) in itertools.product(heads.served, ASKED.items()):
        (name,) = model.names
        is_url = path.startswith("/hf/")
        answer = post(api, f"{path}/{name}" if is_url else path, **body, **({} if is_url else {"model": name}))
        if path in model.endpoints:
            assert not isinstance(answer, tuple), (path, name, answer)
        else:
            status, error = answer
            message = error if is_url else error["message"]
            assert status == 400 and all(endpoint in message for endpoint in model.endpoints), (path, name, message)


def test_models_are_listed_with_their_tasks(api: RunningApi) -> None:
    with urllib.request.urlopen(api.url + "/v1/models") as answer:
        tasks = {card["id"]: card["task"] for card in json.load(answer)["data"]}
    assert tasks == {
        "tiny": "text-generation",
        **dict.fromkeys(("topics", "flags", "rating", "judge"), "text-classification"),
        "entities": "token-classification",
        "answers": "question-answering",
    }


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/classify", {}, "input"),
        ("/classify", {"input": ""}, "input"),
        ("/classify", {"input": []}, "input"),
        ("/classify", {"input": [1.5]}, "input"),
        ("/classify", {"input": [9999]}, "input"),
        ("/classify", {"input": "the sea " * 500}, "input"),
        ("/classify", {"input": ["a"] * 201}, "input"),
        ("/classify", {"input": "a", "lables": ["b"]}, "lables"),
        ("/classify", {"input": "a", "labels": ["b", "b"]}, "labels"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/pooling", {"input": "a", "task": "rank"}, "task"),
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"text_1": [[1]], "text_2": "b"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": ["b"] * 201}, "text_2"),
        ("/score", {"model": "judge", "text_1": "a", "text_2": ["b"] * 201}, "text_2"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_bad_bodies_are_named(api: RunningApi, path: str, body: dict[str, Any], param: str) -> None:
    status, error = post(api, path, **body)
    assert status == 400 and error["param"] == param, error
