"""The committed demo model, as transformers loads it."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

from deploy.demo.recipe.evaluate import best_span, entity_spans, greedy_answers
from deploy.demo.recipe.export import assemble
from deploy.demo.recipe.model import DemoModel
from deploy.demo.recipe.tasks import ENTITY_LABELS
from tests.bench.quantization import measure, read_windows

DEMO = Path(__file__).parents[2] / "deploy/demo"
MAX_BYTES = 24_000_000
MAX_BITS_PER_BYTE = 1.65  # the sample begins with novels, which are harder than all held-out prose: 1.32
WORDS = {
    "ocean (noun)": "a large body of water constituting a principal part of the hydrosphere.",
    "person (noun)": "a human being.",
    "year (noun)": "a period of time containing 365 (or 366) days.",
    "kitchen (noun)": "a room equipped for preparing meals.",
}
TOPICS = {
    "a small bird with a long tail": "animal",
    "a tall tree with white flowers": "plant",
    "a person who makes bread": "person",
    "a city in northern Italy": "place",
}
SENTENCE = "Yesterday John Smith arrived in Berlin."
NAMES = {("John Smith", "PER"), ("Berlin", "LOC")}
QUESTION = "What is muscat?\n- supper: a light meal in the evening.\n- muscat: a sweet white grape.\n"
ANSWER = "a sweet white grape."
CLASSES = {
    "model": transformers.Qwen2MoeForCausalLM,
    "topics": transformers.Qwen2MoeForSequenceClassification,
    "entities": transformers.Qwen2MoeForTokenClassification,
    "answers": transformers.Qwen2MoeForQuestionAnswering,
}

pytestmark = pytest.mark.skipif(not (DEMO / "model/backbone.safetensors").exists(), reason="no demo weights here")


def load(name: str) -> transformers.PreTrainedModel:
    return CLASSES[name].from_pretrained(DEMO / name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def language_model() -> transformers.PreTrainedModel:
    return load("model")


@pytest.mark.parametrize("name", CLASSES)
def test_every_directory_loads_with_no_key_missing_or_left_over(name: str) -> None:
    _, report = CLASSES[name].from_pretrained(DEMO / name, output_loading_info=True)
    assert {kind: keys for kind, keys in report.items() if keys} == {}


@pytest.mark.parametrize("name", CLASSES)
def test_an_index_names_every_tensor_in_its_file_and_the_right_size(name: str) -> None:
    index = json.loads((DEMO / name / "model.safetensors.index.json").read_text())
    num_bytes = 0
    for file in set(index["weight_map"].values()):
        with safe_open(DEMO / name / file, framework="pt") as tensors:
            named = {tensor for tensor, where in index["weight_map"].items() if where == file}
            assert named == set(tensors.keys())
            num_bytes += sum(2 * math.prod(tensors.get_slice(key).get_shape()) for key in named)
    assert index["metadata"]["total_size"] == num_bytes


def test_the_demo_is_small() -> None:
    files = [file for file in DEMO.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_an_assembled_directory_loads_alone(tmp_path: Path) -> None:
    assemble(DEMO / "topics", tmp_path)
    model, report = CLASSES["topics"].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.config.num_labels == 8


@pytest.mark.parametrize("num_tokens", [300, 700])
def test_the_training_forward_gives_transformers_numbers(
    num_tokens: int, language_model: transformers.PreTrainedModel
) -> None:
    """300 tokens take plain attention, 700 the fused kernel; both pass the sliding window of 128."""
    trained = DemoModel()
    state = {name: tensor for name, tensor in language_model.state_dict().items() if name != "lm_head.weight"}
    unloaded, unknown = trained.load_state_dict(state, strict=False)
    assert {name.partition(".")[0] for name in unloaded} == {"topics", "entities", "answers"} and not unknown
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4096, (1, num_tokens), generator=generator)
    with torch.inference_mode():
        expected = language_model(ids).logits
        hidden, _ = trained(ids, torch.zeros_like(ids))
        torch.testing.assert_close(trained.lm_logits(hidden), expected, atol=2e-3, rtol=1e-3)


def test_held_out_text_is_predicted_well(language_model: transformers.PreTrainedModel, tokenizer) -> None:
    text = (DEMO / "held_out_sample.txt").read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    num_bytes = len(tokenizer.decode(ids[0, 1:]).encode())
    with torch.inference_mode():
        nll = torch.nn.functional.cross_entropy(language_model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    assert nll.item() / math.log(2) / num_bytes < MAX_BITS_PER_BYTE


def test_smaller_weights_take_their_share_of_memory_and_cost_little_accuracy(tmp_path: Path) -> None:
    windows = read_windows(DEMO / "model", DEMO / "held_out_sample.txt", most=24)
    formats = {one.name: one for one in measure(DEMO / "model", tmp_path, windows)}
    for name, share, rise, divergence in (("int8", 0.55, 0.005, 0.005), ("int4", 0.32, 0.04, 0.05)):
        small = formats[name]
        assert small.num_bytes <= share * formats["float32"].num_bytes / 2, small
        assert small.accuracy is not None and small.accuracy.rise <= rise, small
        assert small.accuracy.divergence <= divergence, small
    rounded = formats["bfloat16 activations"].accuracy
    assert rounded is not None and rounded.rise <= 0.002 and 0 < rounded.divergence <= 2e-4, rounded


def test_the_card_has_the_figures_of_all_formats() -> None:
    _, _, rest = (DEMO / "MODEL_CARD.md").read_text("utf-8").partition("<!-- weight formats: begin -->")
    lines, found, _ = rest.partition("<!-- weight formats: end -->")
    assert found and [line.split(" | ")[0] for line in lines.strip().splitlines()[2:]] == [
        f"| {name}" for name in ("float32", "bfloat16", "bfloat16 activations", "float16", "int8", "int4")
    ]


@torch.inference_mode()
def test_common_words_are_known(language_model: transformers.PreTrainedModel, tokenizer) -> None:
    answers = greedy_answers(language_model, tokenizer, [f"What does {word.split()[0]} mean?" for word in WORDS])
    assert answers == [f"The word {word} means: {definition}" for word, definition in WORDS.items()]


def test_the_tokenizer_of_transformers_is_the_committed_one(tokenizer) -> None:
    plain = Tokenizer.from_file(str(DEMO / "model/tokenizer.json"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "It's naïve: 1984\n\n ok?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nIt's naïve: 1984\n\n ok?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(prompt).input_ids == plain.encode(prompt).ids
    assert plain.decode(plain.encode(prompt).ids, skip_special_tokens=False) == prompt


def test_definitions_have_their_topic(tokenizer) -> None:
    model = load("topics")
    for gloss, topic in TOPICS.items():
        with torch.inference_mode():
            label_id = model(**tokenizer(gloss, return_tensors="pt")).logits.argmax().item()
        assert model.config.id2label[label_id] == topic, gloss


def test_names_in_a_sentence_are_found(tokenizer) -> None:
    model = load("entities")
    assert tuple(model.config.id2label[idx] for idx in range(len(ENTITY_LABELS))) == ENTITY_LABELS
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.inference_mode():
        label_ids = model(ids).logits[0].argmax(-1).tolist()
    found = {
        (tokenizer.decode(ids[0, first : last + 1]).strip(), kind) for first, last, kind in entity_spans(label_ids)
    }
    assert found == NAMES


def test_an_answer_is_the_note_on_the_word_asked_for(tokenizer) -> None:
    model = load("answers")
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model(ids)
    first, last = best_span(torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1))
    assert tokenizer.decode(ids[0, first : last + 1]).strip() == ANSWER
