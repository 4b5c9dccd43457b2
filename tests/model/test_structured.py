"""Structured output: which tokens a grammar allows, and what refused grammars say."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from llguidance.gbnf_to_lark import is_lark_syntax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.sampler_state import SamplerState, SamplingRow
from model.sampling import sample
from model.sampling_params import SamplingParams, StructuredSpec
from model.structured import MAX_PAYLOAD_CHARS, GrammarCompiler, Matcher, is_lark
from model.tokenizer import Tokenizer as ModelTokenizer

VOCAB_SIZE = 512  # wider than the tokenizer, as padded embeddings are
END, IM_END = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE like Qwen's, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['{"name": "Ada", "age": 36, "tags": ["a", "b"]}', "the quick brown fox"], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(ModelTokenizer(tokenizer, {}), VOCAB_SIZE, [END, IM_END])


def allowed(matcher: Matcher) -> set[int]:
    bits = np.unpackbits(matcher.bitmask().numpy().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def generate(matcher: Matcher, tokenizer: Tokenizer, seed: int, max_tokens: int = 400) -> str:
    """Text of a model that knows nothing: random logits, drawn under the grammar until it ends."""
    generator = torch.Generator().manual_seed(seed)
    state = SamplerState(SamplingParams(seed=seed), [5], eos_token_ids=[END, IM_END])
    while not matcher.is_finished and len(state.output_ids) < max_tokens:
        logits = torch.randn(1, VOCAB_SIZE, generator=generator)
        logits[0, tokenizer.token_to_id('"')] += 3  # so that strings end
        output = sample(logits, [SamplingRow(state=state, bitmask=matcher.bitmask())])
        assert output.errors == [None]
        if output.token_ids[0] in (END, IM_END):
            break
        assert matcher.accept(output.token_ids[0]), matcher.error
        state.append(output.token_ids[0])
    return str(tokenizer.decode(state.output_ids))


def test_the_bitmask_has_one_bit_for_each_logit(compiler: GrammarCompiler) -> None:
    mask = compiler.compile(StructuredSpec("regex", "a")).bitmask()
    assert mask.dtype == torch.int32
    assert mask.shape == (VOCAB_SIZE // 32,)


def test_a_regex_allows_its_characters_and_the_end_where_it_may_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    matcher = compiler.compile(StructuredSpec("regex", "ab?"))
    assert allowed(matcher) == {a}
    assert matcher.accept(a)
    assert allowed(matcher) == {b, END, IM_END}
    assert not matcher.is_finished
    assert matcher.accept(b)
    assert matcher.is_finished
    assert matcher.error is None


def test_a_token_outside_the_grammar_is_refused_with_a_reason(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(StructuredSpec("regex", "ab?"))
    assert not matcher.accept(tokenizer.token_to_id("b"))
    assert "doesn't satisfy the grammar" in str(matcher.error)


@pytest.mark.parametrize("end", [END, IM_END])
def test_either_end_token_ends_the_output(compiler: GrammarCompiler, tokenizer: Tokenizer, end: int) -> None:
    matcher = compiler.compile(StructuredSpec("regex", "a+"))
    assert matcher.accept(tokenizer.token_to_id("a"))
    assert matcher.accept(end)
    assert matcher.is_finished


@pytest.mark.parametrize("seed", range(5))
def test_random_logits_under_a_schema_give_valid_json(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    text = generate(compiler.compile(StructuredSpec("json_schema", json.dumps(schema))), tokenizer, seed)
    value = json.loads(text)
    assert set(value) == {"name", "age", "tags"}
    assert 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 3


def test_a_json_object_starts_with_a_brace(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    starts = {tokenizer.id_to_token(token)[0] for token in allowed(compiler.compile(StructuredSpec("json_object")))}
    assert starts == {"{"}


def test_the_schema_true_allows_any_json_and_false_is_refused(compiler: GrammarCompiler) -> None:
    assert allowed(compiler.compile(StructuredSpec("json_schema", "true"))) == allowed(
        compiler.compile(StructuredSpec("json_schema", "{}"))
    )
    with pytest.raises(ValueError, match="must be a JSON object, got False"):
        compiler.compile(StructuredSpec("json_schema", "false"))


def test_whitespace_in_json_ends_at_some_point(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(StructuredSpec("json_object"))
    space = tokenizer.token_to_id("Ġ")
    assert matcher.accept(tokenizer.token_to_id("{"))
    count = 0
    while space in allowed(matcher) and count < 100:
        assert matcher.accept(space)
        count += 1
    assert 0 < count < 100


def test_a_choice_gives_one_of_its_strings(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no", 'a "quoted" \\ word', "größer\nline", "日本", "\x00\x1b\x7f"]
    spec = StructuredSpec("choice", json.dumps(choices))
    seen = {generate(compiler.compile(spec), tokenizer, seed) for seed in range(60)}
    assert seen == set(choices)


@pytest.mark.parametrize("grammar", ['start: "a" n\nn: /[0-9]{2}/', 'root ::= "a" n\nn ::= [0-9] [0-9]'])
def test_lark_and_gbnf_grammars_both_work(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str) -> None:
    text = generate(compiler.compile(StructuredSpec("grammar", grammar)), tokenizer, 1)
    assert re.fullmatch("a[0-9]{2}", text)


def test_lark_is_told_from_gbnf_as_llguidance_does() -> None:
    pieces = ["\n", "\r", " ", "\t", "\x0b", "\u2028", "start", "%llguidance", ":", "::=", "x", "{"]
    generator = random.Random(0)
    grammars = ["".join(generator.choices(pieces, k=generator.randrange(8))) for _ in range(5000)]
    found = [is_lark(grammar) for grammar in grammars]
    assert found == [is_lark_syntax(grammar) for grammar in grammars]
    assert 500 < sum(found) < 4500


@pytest.mark.parametrize(
    ("kind", "payload", "message"),
    [
        ("regex", "([a", "unclosed character class"),
        ("grammar", "start: missing", "unknown name"),
        ("grammar", "root ::= missing", "nor GBNF"),
        ("grammar", "root ::= " + "(" * 3000, "nor GBNF"),
        ("grammar", "root ::= " + "." * 20_000, "at most 300 rules and 16384 characters"),
        ("grammar", "".join(f"r{i} ::= r{i + 1}\n" for i in range(400)), "got 400"),
        ("grammar", "\n" * 20_000, "at most 300 rules"),  # and at once: seconds with the GIL held, in llguidance
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"not": {"type": "string"}}', "not"),
        ("json_schema", "{", "valid JSON"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_schema", '{} }, {"lark_grammar": "start: /x/"', "valid JSON"),
        ("json_schema", '{"items":' * 5000 + "1" + "}" * 5000, "json_schema"),
        ("choice", "[]", "one or more"),
        ("choice", '["a", ""]', "non-empty"),
        ("regex", "a" * (MAX_PAYLOAD_CHARS + 1), "at most"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_with_a_short_reason(
    compiler: GrammarCompiler, kind: str, payload: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compiler.compile(StructuredSpec(kind, payload))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 600


def test_a_schema_bomb_is_refused_or_ends_in_an_error_and_never_hangs(compiler: GrammarCompiler) -> None:
    alternatives = [
        {"type": "object", "properties": {f"k{i}_{j}": {"type": "string", "pattern": f"^[a-z{j % 10}]{{1,{i + 50}}}$"}}}
        for i in range(30)
        for j in range(40)
    ]
    try:
        matcher = compiler.compile(StructuredSpec("json_schema", json.dumps({"anyOf": alternatives})))
    except ValueError:
        return
    generator = random.Random(0)
    for _ in range(20):
        tokens = sorted(allowed(matcher))
        if matcher.is_finished or not matcher.accept(generator.choice(tokens)):
            break


def test_requests_with_the_same_grammar_do_not_disturb_each_other(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    spec = StructuredSpec("regex", "ab")
    first, second = compiler.compile(spec), compiler.compile(spec)
    a = tokenizer.token_to_id("a")
    assert first.accept(a)
    assert allowed(second) == {a}


def test_threads_may_compile_at_the_same_time(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    specs = [StructuredSpec("regex", f"[a-c]{{{length}}}") for length in (1, 2, 3, 4)] * 8
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda spec: generate(compiler.compile(spec), tokenizer, 0), specs))
    assert [len(text) for text in texts] == [1, 2, 3, 4] * 8


def test_more_grammars_than_the_cache_holds_still_compile(compiler: GrammarCompiler) -> None:
    for length in range(1, 90):
        assert not compiler.compile(StructuredSpec("regex", f"x{{{length}}}")).is_finished


@pytest.mark.parametrize("eos_token_ids", [[], [VOCAB_SIZE - 1], [2**40]])
def test_without_an_end_token_in_the_tokenizer_grammars_are_refused_with_the_reason(
    tokenizer: Tokenizer, eos_token_ids: list[int]
) -> None:
    compiler = GrammarCompiler(ModelTokenizer(tokenizer, {}), VOCAB_SIZE, eos_token_ids)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        compiler.compile(StructuredSpec("regex", "a"))


def test_end_tokens_outside_the_tokenizer_are_left_out(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(ModelTokenizer(tokenizer, {}), VOCAB_SIZE, [VOCAB_SIZE - 1, IM_END, 2**40])
    matcher = compiler.compile(StructuredSpec("regex", "ab?"))
    assert matcher.accept(tokenizer.token_to_id("a"))
    assert allowed(matcher) == {tokenizer.token_to_id("b"), IM_END}


def test_a_tokenizer_that_llguidance_does_not_know_refuses_grammars_with_the_reason() -> None:
    compiler = GrammarCompiler(ModelTokenizer(Tokenizer(models.WordLevel({"a": 0}, "a")), {}), VOCAB_SIZE, [0])
    with pytest.raises(ValueError, match=r"tokenizer\.json doesn't work"):
        compiler.compile(StructuredSpec("regex", "a"))


def test_min_tokens_gives_way_to_a_grammar_that_has_ended(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(StructuredSpec("regex", "a"))
    state = SamplerState(SamplingParams(min_tokens=5), [5], eos_token_ids=[END, IM_END])
    a = tokenizer.token_to_id("a")
    assert matcher.accept(a)
    state.append(a)
    output = sample(torch.zeros(1, VOCAB_SIZE), [SamplingRow(state=state, bitmask=matcher.bitmask())])
    assert output.errors == [None]
    assert output.token_ids[0] in (END, IM_END)
