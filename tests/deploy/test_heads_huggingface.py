"""The Hugging Face task endpoints through huggingface_hub's own client, against transformers' pipelines."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
import transformers
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError, ValidationError

from deploy import huggingface
from deploy.huggingface_generation import TextGenerationParameters
from deploy.settings import Settings
from tests.deploy.fakes import RunningApi, running_api
from tests.deploy.tiny_heads import TinyHeads, likelihood, write_tiny_heads

PLAIN = [
    "the whale",
    "The ship and the storm went over the sea.",
    "Mr. Melville's ship left Nantucket, in 1841!",
    "a  b   the",
]
ODD = "Zoe\u0308 🙂👩\u200d🚀 saw e\u0301te\u0301 in 한국 \u1112\u1161\u11ab and x\u0301."
LONG = "The whale and the ship met in the storm near Cape Horn, and the captain saw it. " * 12


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> TinyHeads:
    return write_tiny_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def api(heads: TinyHeads) -> Iterator[RunningApi]:
    settings = Settings.model_validate({"mesh": {"token": "t"}})
    with running_api(heads.served, settings, heads.router()) as running:
        yield running


def client(api: RunningApi, task: str) -> InferenceClient:
    return InferenceClient(model=f"{api.url}/hf/{task}", token="x")


def pipeline(heads: TinyHeads, kind: Any, name: str) -> Any:
    return kind(model=heads.oracles[name], tokenizer=heads.tokenizer)


@pytest.mark.parametrize(
    ("method", "kind", "inputs"),
    [
        (InferenceClient.text_classification, huggingface.TextClassificationParameters, {"text"}),
        (InferenceClient.token_classification, huggingface.TokenClassificationParameters, {"text"}),
        (InferenceClient.question_answering, huggingface.QuestionAnsweringParameters, {"question", "context"}),
        (InferenceClient.zero_shot_classification, huggingface.ZeroShotParameters, {"text"}),
        (
            InferenceClient.text_generation,
            TextGenerationParameters,
            {"prompt", "stream", "stop_sequences"},  # the last is an old name that the client itself turns into `stop`
        ),
    ],
)
def test_every_option_of_the_client_is_known(method: Any, kind: Any, inputs: set[str]) -> None:
    options = set(inspect.signature(method).parameters) - {"self", "model"} - inputs
    assert options <= set(kind.model_fields)


@pytest.mark.parametrize("name", ["topics", "flags", "rating", "judge"])
def test_text_classification_is_the_pipelines(api: RunningApi, heads: TinyHeads, name: str) -> None:
    classify = pipeline(heads, transformers.TextClassificationPipeline, name)
    url = f"text-classification/{name}"
    for text, top_k, function in itertools.product([*PLAIN[:2], ODD], [None, 2], [None, "softmax", "sigmoid", "none"]):
        options = {} if function is None else {"function_to_apply": function}
        found = client(api, url).text_classification(text, top_k=top_k, function_to_apply=function)  # type: ignore[arg-type]
        expected = classify(text, top_k=top_k, **options)
        assert [one.label for one in found] == [one["label"] for one in expected]
        assert [one.score for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-4)


def test_the_first_model_of_a_task_answers_where_none_is_named(api: RunningApi) -> None:
    assert client(api, "text-classification").text_classification("the sea") == client(
        api, "text-classification/topics"
    ).text_classification("the sea")
    pair = {"text": "the whale", "text_pair": "the sea"}
    answers = httpx.post(f"{api.url}/hf/text-classification", json={"inputs": ["the whale", pair]}).json()
    assert len(answers) == 2 and answers[0] != answers[1]


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification_is_the_pipelines(api: RunningApi, heads: TinyHeads, strategy: Any) -> None:
    tag = pipeline(heads, transformers.TokenClassificationPipeline, "entities")
    for text, ignored in itertools.product(PLAIN, [None, ["B-PER", "MISC"], []]):
        options = {} if ignored is None else {"ignore_labels": ignored}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = tag(text, aggregation_strategy=strategy, **options)
        found = client(api, "token-classification").token_classification(
            text, aggregation_strategy=strategy, ignore_labels=ignored
        )
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.score == pytest.approx(float(other["score"]), abs=1e-4)
            if strategy == "none":
                assert (one.entity, one["index"], one.word) == (other["entity"], other["index"], other["word"])
                assert (one.start, one.end) == (other["start"], other["end"])
            else:  # the pipeline's places begin with the space before a word; ours don't
                assert (one.entity_group, one.word.strip()) == (other["entity_group"], other["word"].strip())
                there = text[other["start"] : other["end"]]
                if there.strip():
                    assert one.start == other["start"] + len(there) - len(there.lstrip())
                    assert one.end == other["start"] + len(there.rstrip())


def test_a_long_text_is_tagged_in_windows(api: RunningApi, heads: TinyHeads) -> None:
    tag = pipeline(heads, transformers.TokenClassificationPipeline, "entities")
    expected = tag(LONG, aggregation_strategy="simple", stride=20)
    found = client(api, "token-classification").token_classification(LONG, aggregation_strategy="simple", stride=20)
    assert len(expected) > 20
    assert [(one.entity_group, one.word.strip()) for one in found] == [
        (one["entity_group"], one["word"].strip()) for one in expected
    ]
    assert [one.score for one in found] == pytest.approx([float(one["score"]) for one in expected], abs=1e-4)
    assert all(LONG[one.start : one.end] == one.word for one in found)
    with pytest.raises(BadRequestError, match="stride"):
        client(api, "token-classification").token_classification(LONG)
    with pytest.raises(BadRequestError, match="stride"):
        client(api, "token-classification").token_classification(LONG, stride=96)


def test_places_index_the_callers_text_with_emoji_and_combining_marks(api: RunningApi, heads: TinyHeads) -> None:
    tag = client(api, "token-classification")
    tokens = tag.token_classification(ODD, aggregation_strategy="none", ignore_labels=[])
    covered = {i for token in tokens for i in range(token.start, token.end)}
    assert covered == set(range(len(ODD)))  # every character belongs to a token
    marks = [i for i, char in enumerate(ODD) if char in "\u0308\u1161\u11ab"]
    assert all(any(token.start < i < token.end for token in tokens) for i in marks)
    for strategy in ("simple", "first", "average", "max"):
        for one in tag.token_classification(ODD, aggregation_strategy=strategy, ignore_labels=[]):  # type: ignore[arg-type]
            assert ODD[one.start : one.end] == one.word and (one.word == one.word.strip() or not one.word.strip())
        found = tag.token_classification(ODD, aggregation_strategy=strategy, ignore_labels=[])  # type: ignore[arg-type]
        assert all(one.end <= other.start for one, other in itertools.pairwise(found))
    answer = client(api, "question-answering").question_answering("What is it?", ODD, max_answer_len=50)
    assert answer.answer == ODD[answer.start : answer.end]


def test_question_answering_is_the_documented_algorithm(api: RunningApi, heads: TinyHeads) -> None:
    ask = client(api, "question-answering")
    for question, context, max_len in itertools.product(["What is it?", "Who saw the whale"], PLAIN, [1, 15]):
        found = ask.question_answering(question, context, top_k=6, max_answer_len=max_len, align_to_words=False)
        expected = spans_by_hand(heads, question, context, max_len, top_k=6)
        assert isinstance(found, list) and [one.answer for one in found] == [one[1] for one in expected]
        assert [one.score for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
        assert all(context[one.start : one.end] == one.answer for one in found)
        best = ask.question_answering(question, context, max_answer_len=max_len)
        assert not isinstance(best, list) and best.answer.strip()


def spans_by_hand(heads: TinyHeads, question: str, context: str, max_len: int, top_k: int) -> list[tuple[float, str]]:
    """Every span of the context, one after the other."""
    encoding = heads.tokenizer(question, context, return_offsets_mapping=True)
    mine = [i for i, text in enumerate(encoding.sequence_ids()) if text == 1]
    outputs = heads.outputs("answers", encoding["input_ids"])[mine].double().softmax(dim=0)
    spans = [
        (float(outputs[b, 0] * outputs[e, 1]), mine[b], mine[e])
        for b in range(len(mine))
        for e in range(b, min(b + max_len, len(mine)))
    ]
    found: dict[str, float] = {}
    for score, begin, end in sorted(spans, reverse=True)[:top_k]:
        text = context[encoding["offset_mapping"][begin][0] : encoding["offset_mapping"][end][1]].strip()
        known = next((one for one in found if one.lower() == text.lower()), text)
        found[known] = found.get(known, 0.0) + score
    return sorted(((score, text) for text, score in found.items() if text), reverse=True)


def test_the_checkpoint_says_what_holds_where_a_request_says_nothing(api: RunningApi) -> None:
    ask = client(api, "question-answering")
    found = ask.question_answering("What is it?", PLAIN[1], top_k=500)
    assert found == ask.question_answering("What is it?", PLAIN[1], top_k=500, max_answer_len=4)
    assert len(ask.question_answering("What is it?", PLAIN[1], top_k=500, max_answer_len=6)) > len(found)


def test_answers_are_whole_words_unless_told_otherwise(api: RunningApi) -> None:
    ask = client(api, "question-answering")
    text = "Melville saw Nantucket"
    for answer in ask.question_answering("Where?", text, top_k=4, max_answer_len=3):
        assert all(word in text.split() for word in answer.answer.split())


def test_a_long_context_is_read_in_windows_and_the_best_answer_stands(api: RunningApi, heads: TinyHeads) -> None:
    ask = client(api, "question-answering")
    options: Any = {"max_seq_len": 64, "doc_stride": 16, "top_k": 3, "align_to_words": False, "max_answer_len": 15}
    found = ask.question_answering("What is it?", LONG, **options)
    encoding = heads.tokenizer(
        "What is it?",
        LONG,
        truncation="only_second",
        max_length=64,
        stride=16,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best = 0.0
    for i, ids in enumerate(encoding["input_ids"]):
        mine = [j for j, text in enumerate(encoding.sequence_ids(i)) if text == 1]
        scores = heads.outputs("answers", ids)[mine].double().softmax(dim=0)
        table = (scores[:, :1] * scores[:, 1]).triu().tril(14)
        best = max(best, float(table.max()))
    assert len(encoding["input_ids"]) > 5
    assert isinstance(found, list) and found[0].score == pytest.approx(best, abs=1e-4)
    assert all(LONG[one.start : one.end] == one.answer for one in found)
    with pytest.raises(BadRequestError, match="doc_stride"):
        ask.question_answering("What is it?", LONG, max_seq_len=32, doc_stride=31)


def test_no_answer_is_an_answer_when_it_is_asked_for(api: RunningApi) -> None:
    ask = client(api, "question-answering")
    found = ask.question_answering("What?", PLAIN[1], top_k=100, handle_impossible_answer=True)
    assert [(one.start, one.end) for one in found if one.answer == ""] == [(0, 0)]
    assert sum(one.score for one in found) <= 1 + 1e-6
    assert all(one.answer for one in ask.question_answering("What?", PLAIN[1], top_k=100))


def test_zero_shot_classification_needs_no_head(api: RunningApi, heads: TinyHeads) -> None:
    classify = client(api, "zero-shot-classification")
    labels = ["whale", "storm", "the sea"]
    found = classify.zero_shot_classification("the ship", labels)
    ids = heads.tokenizer("the ship")["input_ids"]
    expected = torch.tensor([likelihood(heads, ids, f"\nThis example is {label}.") for label in labels]).softmax(-1)
    assert {one.label: one.score for one in found} == pytest.approx(
        dict(zip(labels, expected.tolist(), strict=True)), abs=1e-4
    )
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    each = classify.zero_shot_classification("the ship", labels, multi_label=True, hypothesis_template="It is {}")
    assert all(0 < one.score < 1 for one in each) and {one.label for one in each} == set(labels)
    with pytest.raises(BadRequestError, match="exactly once"):
        classify.zero_shot_classification("the ship", labels, hypothesis_template="nothing")


def test_text_is_generated_as_tgi_does(api: RunningApi, heads: TinyHeads) -> None:
    generate = client(api, "text-generation")
    text = generate.text_generation("the whale", max_new_tokens=12)
    assert text == generate.text_generation("the whale", max_new_tokens=12)  # greedy
    assert "".join(generate.text_generation("the whale", max_new_tokens=12, stream=True)) == text
    assert generate.text_generation("the whale", max_new_tokens=12, return_full_text=True) == "the whale" + text
    whole = generate.text_generation(
        "the whale", max_new_tokens=12, details=True, decoder_input_details=True, top_n_tokens=2
    )
    details = whole.details
    assert details is not None and whole.generated_text == text
    assert details.generated_tokens == len(details.tokens) <= 12 and details.seed is None
    assert "".join(token.text for token in details.tokens) == text
    assert [token.id for token in details.prefill] == heads.tokenizer("the whale")["input_ids"]
    assert details.prefill[0].logprob is None and details.prefill[1].logprob < 0
    assert details.top_tokens is not None and len(details.top_tokens) == len(details.tokens)
    assert [top[0]["id"] for top in details.top_tokens] == [token.id for token in details.tokens]
    events = list(generate.text_generation("the whale", max_new_tokens=12, details=True, stream=True))
    assert [event.token.id for event in events] == [token.id for token in details.tokens]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    last = events[-1]
    assert last.generated_text == text and last.details is not None
    assert last.details.finish_reason == details.finish_reason and last.details.generated_tokens == len(events)
    assert all(event.details is None for event in events[:-1])


def test_generation_stops_with_the_stop_sequence_and_samples_by_seed(api: RunningApi) -> None:
    generate = client(api, "text-generation")
    text = generate.text_generation("the sea", max_new_tokens=16)
    stop = text[4:6]
    stopped = generate.text_generation("the sea", max_new_tokens=16, stop=[stop], details=True)
    assert stopped.generated_text == text[: text.index(stop) + 2]
    assert stopped.details is not None and stopped.details.finish_reason == "stop_sequence"
    events = list(generate.text_generation("the sea", max_new_tokens=16, stop=[stop], stream=True, details=True))
    assert "".join(event.token.text for event in events) == events[-1].generated_text == stopped.generated_text
    drawn = [
        generate.text_generation("the sea", max_new_tokens=8, do_sample=True, seed=seed, details=True)
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0].details is not None and drawn[0].details.seed == 7
    best = generate.text_generation("the sea", max_new_tokens=8, best_of=3, do_sample=True, seed=7, details=True)
    assert best.details is not None and best.details.best_of_sequences is not None
    means = [
        sum(token.logprob for token in one.tokens) / len(one.tokens)
        for one in (best.details, *best.details.best_of_sequences)
    ]
    assert len(means) == 3 and means == sorted(means, reverse=True)
    chosen = generate.text_generation("x", grammar={"type": "regex", "value": "(red|blue)"}, max_new_tokens=20)  # type: ignore[arg-type]
    assert chosen in ("red", "blue")


def test_what_cannot_be_obeyed_is_refused_in_tgis_words(api: RunningApi) -> None:
    generate = client(api, "text-generation")
    refused: list[dict[str, Any]] = [
        {"typical_p": 0.5},
        {"watermark": True},
        {"adapter_id": "a"},
        {"best_of": 2},
        {"max_new_tokens": 100_000},
    ]
    for options in refused:
        with pytest.raises(ValidationError, match=next(iter(options))):
            generate.text_generation("x", **options)
    with pytest.raises(BadRequestError, match="/hf/token-classification"):
        client(api, "text-classification/entities").text_classification("x")
    for task, body in (
        ("text-classification", {"inputs": 3}),
        ("token-classification", {"inputs": []}),
        ("question-answering", {"inputs": {"question": "a"}}),
        ("question-answering", {"inputs": {"question": "a", "context": ""}}),
        ("text-generation", {"inputs": ["a"]}),
        ("text-generation", {"inputs": "a", "parameters": {"tempreature": 1}}),
        ("zero-shot-classification", {"inputs": "a", "parameters": {}}),
    ):
        answer = httpx.post(f"{api.url}/hf/{task}", json=body)
        assert answer.status_code == 400 and answer.json()["error_type"] == "validation", answer.text
    assert httpx.post(f"{api.url}/hf/image-classification", json={"inputs": "a"}).status_code == 404


HOSTILE: list[Any] = [
    None,
    "",
    0,
    -1,
    2**70,
    1.5,
    True,
    [],
    [None],
    {},
    {"a": 1},
    "x" * 5000,
    ["a", 1],
    [["a"]],
    "\x00",
]
FIELDS = {
    "/classify": ("input", "labels", "label_template", "truncate_prompt_tokens", "use_activation", "priority", "model"),
    "/pooling": ("input", "task", "encoding_format", "cache_salt"),
    "/v1/embeddings": ("input", "encoding_format", "dimensions", "user"),
    "/score": ("text_1", "text_2", "truncate_prompt_tokens"),
    "/hf/text-classification": ("inputs", "parameters", "options", "top_k", "function_to_apply"),
    "/hf/token-classification": ("inputs", "aggregation_strategy", "ignore_labels", "stride"),
    "/hf/question-answering": ("inputs", "top_k", "doc_stride", "max_answer_len", "max_seq_len", "max_question_len"),
    "/hf/zero-shot-classification": ("inputs", "candidate_labels", "hypothesis_template", "multi_label"),
    "/hf/text-generation": ("inputs", "stream", "grammar", "stop", "seed", "truncate", "top_n_tokens", "temperature"),
}


@pytest.mark.parametrize("path", FIELDS)
def test_no_body_brings_a_server_error(api: RunningApi, path: str) -> None:
    good: dict[str, Any] = {"input": "a b", "text_1": "a", "text_2": "b", "labels": ["a"]}
    inputs: Any = {"question": "a b", "context": "the sea"} if "question" in path else "the sea"
    with httpx.Client(base_url=api.url) as http:
        for field, value in itertools.product(FIELDS[path], HOSTILE):
            if path.startswith("/hf/"):
                is_parameter = field not in ("inputs", "parameters", "options", "stream")
                parameters = {"candidate_labels": ["a", "b"]} if "zero" in path else {}
                parameters |= {"max_new_tokens": 2} if "generation" in path else {}
                body = {"inputs": inputs, "parameters": parameters | ({field: value} if is_parameter else {})}
                body |= {} if is_parameter else {field: value}
            else:
                names = {"/score": ("text_1", "text_2")}.get(path, ("input",))
                body = {name: good[name] for name in names} | {field: value}
            answer = http.post(path, json=body)
            assert answer.status_code in (200, 400, 404), (body, answer.text)


def test_many_texts_in_one_body_answer_as_one_by_one(api: RunningApi) -> None:
    for task in ("text-classification", "token-classification"):
        texts = [*PLAIN, ODD]
        together = httpx.post(f"{api.url}/hf/{task}", json={"inputs": texts}).json()
        alone = [httpx.post(f"{api.url}/hf/{task}", json={"inputs": text}).json() for text in texts]
        assert together == [one[0] if task == "text-classification" else one for one in alone]
