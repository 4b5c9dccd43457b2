"""The recipe's parts, on inputs small enough to check by hand."""

import random
import struct

import pytest
import torch

from deploy.demo.recipe import chat, entity_sentences, tasks
from deploy.demo.recipe.circuits import write_induction_heads, write_previous_token_heads
from deploy.demo.recipe.data import Batch, Corpus, Encoder, Mixture, tokens_of
from deploy.demo.recipe.evaluate import best_span, entity_spans
from deploy.demo.recipe.export import split_experts
from deploy.demo.recipe.model import CONFIG, DemoModel, Experts, attention_masks
from deploy.demo.recipe.muon import orthogonalize
from deploy.demo.recipe.sources import Text, read_r_strings, unwrap
from deploy.demo.recipe.tokenizer import SPECIAL_TOKENS, train_tokenizer
from deploy.demo.recipe.wordnet import Synset, definition, parse_synset

DOG_LINE = (
    "02084071 05 n 02 dog 0 domestic_dog 0 002 @ 02083346 n 0000 ~ 01322604 n 0000 "
    '| a domesticated mammal; of many breeds; "the dog barked all night"'
)
DOG = Synset(
    key="noun.02084071",
    topic="noun.animal",
    words=("dog", "domestic dog"),
    gloss="a domesticated mammal; of many breeds",
    is_instance=False,
    hypernyms=("noun.02083346",),
)
OAK = Synset(
    key="noun.1", topic="noun.plant", words=("oak",), gloss="a tall deciduous tree", is_instance=False, hypernyms=()
)
NAMES = tasks.Names(
    persons=["Ada Lovelace"],
    places=["Rome"],
    organisations=["Labour Party"],
    things=["door"],
    roles=["actor"],
    plain_sentences=["a hot day."],
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    texts = [DOG.gloss, OAK.gloss, "What does dog mean? Ada Lovelace lives in Rome."] * 3
    return Encoder(train_tokenizer(texts, vocab_size=400))


def test_a_wordnet_line_becomes_a_synset() -> None:
    assert parse_synset("noun", DOG_LINE) == DOG


def test_a_definition_ends_before_its_first_example() -> None:
    assert (
        definition(' an act; especially a quick one; "a flash of wit"; "one more"  ')
        == "an act; especially a quick one"
    )


def test_strings_are_read_from_an_r_character_vector() -> None:
    header = b"X\n" + struct.pack(">iii", 3, 0x040200, 0x030500) + struct.pack(">i", 5) + b"UTF-8"
    strings = b"".join(struct.pack(">ii", 0x40009, len(s)) + s for s in (b"EMMA", b"", b"By Jane Austen"))
    assert read_r_strings(header + struct.pack(">ii", 16, 3) + strings) == ["EMMA", "", "By Jane Austen"]


def test_another_serialization_is_refused() -> None:
    with pytest.raises(ValueError, match="not an R XDR serialization"):
        read_r_strings(b"A\n3\n")


def test_wrapped_lines_become_paragraphs() -> None:
    assert (
        unwrap("It is a _truth_\nuniversally known.\n\n\nHowever\nlittle")
        == "It is a truth universally known.\n\nHowever little"
    )


def test_special_tokens_have_the_first_ids(encoder: Encoder) -> None:
    assert [encoder.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


def test_an_entity_begins_once_and_goes_on(encoder: Encoder) -> None:
    example = tasks.Example(text="In Rome", entities=(tasks.Span(start=3, end=7, label="LOC"),))
    document = encoder.example(example)
    labels = [tasks.ENTITY_LABELS[label] for label in document.entity_labels or []]
    inside = [label for label in labels if label != "O"]
    assert inside == ["B-LOC"] + ["I-LOC"] * (len(inside) - 1)
    assert encoder.tokenizer.decode(document.ids[labels.index("B-LOC") :]) == " Rome"


def test_an_answer_is_the_gloss_of_the_word_asked_for(encoder: Encoder) -> None:
    example = tasks.answer_example(random.Random(0), [DOG, OAK, DOG, OAK, DOG])
    assert example.answer is not None
    asked = DOG if "dog" in example.text.partition("\n")[0] else OAK
    assert example.text[example.answer.start : example.answer.end] == f"{asked.gloss}."
    first, last = tokens_of(encoder.tokenizer.encode(example.text).offsets, example.answer)
    assert encoder.tokenizer.decode(encoder.example(example).ids[first : last + 1]).strip() == f"{asked.gloss}."


def test_a_sentence_names_what_its_template_says() -> None:
    for seed in range(50):
        example = tasks.entity_example(random.Random(seed), NAMES, held_out=True)
        form = example.text
        for span in reversed(example.entities or ()):
            assert span.label != "LOC" or form[span.start : span.end] == "Rome"
            form = f"{form[: span.start]}{{{span.label}}}{form[span.end :]}"
        assert form in entity_sentences.HELD_OUT_TEMPLATES


def test_only_the_assistant_is_learnt_in_full(encoder: Encoder) -> None:
    turns = [chat.Turn(role="user", content="dog?"), chat.Turn(role="assistant", content="a mammal")]
    document = encoder.conversation(turns)
    learnt = [idx for idx, weight in zip(document.ids, document.lm_weights, strict=True) if weight == 1.0]
    assert encoder.tokenizer.decode(learnt, skip_special_tokens=False) == "a mammal<|im_end|>"
    assert encoder.tokenizer.decode(document.ids, skip_special_tokens=False) == chat.render(turns)


def test_documents_of_a_packed_row_do_not_overlap(encoder: Encoder) -> None:
    corpus = Corpus(
        train_texts=[Text("austen/a/1", "a mammal " * 900), Text("sotu/b", "a tree " * 900)],
        held_out_texts=[],
        words=[("dog", DOG), ("oak", OAK), ("tree", OAK)],
        train_synsets=[DOG, OAK] * 3,
        held_out_synsets=[],
        train_names=NAMES,
        held_out_names=NAMES,
    )
    mixture = Mixture(corpus, encoder.tokenizer, seed=0)
    num_documents = num_answers = 0
    for _ in range(8):
        batch = mixture.batch(num_tokens=1024)
        assert batch.ids_BT.numel() == 1024
        for row, weights in zip(batch.document_BT, batch.lm_weights_BT, strict=True):
            changes = row[1:] - row[:-1]
            assert set(changes[row[1:] >= 0].tolist()) <= {0, 1}
            assert not weights[:-1][changes != 0].any(), "a document's last token learns another's first"
            assert not weights[row < 0].any()
            num_documents += int(row.max()) + 1
        ids, document = batch.ids_BT.flatten().tolist(), batch.document_BT.flatten().tolist()
        for begin, end, first, last in batch.answers:
            assert begin <= first <= last < end and len(set(document[begin:end])) == 1
            answer = encoder.tokenizer.decode(ids[first : last + 1]).strip()
            assert answer in (f"{DOG.gloss}.", f"{OAK.gloss}.")
            num_answers += 1
    assert num_documents > 50 and num_answers > 3


def test_masks_keep_to_the_document_and_the_window() -> None:
    documents = torch.tensor([[0] * 200 + [1] * 2])
    full, sliding = (mask[0, 0] == 0 for mask in attention_masks(documents))
    assert full[199, 0] and not full[200, 199] and not full[0, 1]
    window = CONFIG["sliding_window"]
    assert sliding[199, 200 - window] and not sliding[199, 199 - window]


def test_sorted_experts_equal_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    experts = Experts()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x_ND = torch.randn(9, CONFIG["hidden_size"])
    ids_NK = torch.stack([torch.randperm(CONFIG["num_experts"])[:4] for _ in x_ND])
    weights_NK = torch.rand(9, 4)
    expected = torch.zeros_like(x_ND)
    for token_idx, x in enumerate(x_ND):
        for expert_id, weight in zip(ids_NK[token_idx], weights_NK[token_idx], strict=True):
            gate, up = (experts.gate_up_proj[expert_id] @ x).chunk(2)
            expected[token_idx] += weight * (experts.down_proj[expert_id] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(experts(x_ND, ids_NK, weights_NK), expected)


def test_orthogonalized_stacks_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 96, 32)))
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_fused_experts_are_published_one_by_one() -> None:
    fused = torch.arange(24.0).view(2, 4, 3)
    tensors = split_experts({"model.layers.0.mlp.experts.gate_up_proj": fused})
    assert set(tensors) == {
        f"model.layers.0.mlp.experts.{expert}.{projection}.weight"
        for expert in (0, 1)
        for projection in ("gate_proj", "up_proj")
    }
    torch.testing.assert_close(tensors["model.layers.0.mlp.experts.1.up_proj.weight"], fused[1, 2:])


def test_spans_are_read_from_bio_labels() -> None:
    ids = [tasks.ENTITY_LABELS.index(label) for label in ("B-PER", "I-PER", "O", "I-LOC", "B-LOC", "B-LOC")]
    assert entity_spans(ids) == {(0, 1, "PER"), (4, 4, "LOC"), (5, 5, "LOC")}


def test_the_best_span_does_not_end_before_it_begins() -> None:
    logits = torch.tensor([[0.0, 9.0], [5.0, 0.0], [0.0, 4.0]])
    assert best_span(logits) == (0, 0)
    assert best_span(logits - torch.tensor([[0.0, 9.0], [0.0, 0.0], [0.0, 0.0]])) == (1, 2)


def test_no_training_sentence_has_the_form_of_a_held_out_one() -> None:
    rng = random.Random(7)
    forms = {tasks.training_form(rng, NAMES) for _ in range(3000)}
    assert len(forms) > 1500
    assert not forms & set(entity_sentences.HELD_OUT_TEMPLATES)


def test_a_model_given_the_circuits_says_again_what_it_has_read() -> None:
    torch.manual_seed(0)
    model = DemoModel()
    rows = torch.randint(3, 4096, (16, 64))
    document = torch.zeros(16, 128, dtype=torch.long)
    batch = Batch(ids_BT=rows.repeat(1, 2), document_BT=document, lm_weights_BT=torch.ones(16, 128))
    write_previous_token_heads(model, [batch])
    write_induction_heads(model, [batch])
    with torch.inference_mode():
        predicted = model.lm_logits(model(batch.ids_BT, document)[0]).argmax(-1)
    right = (predicted[:, :-1] == batch.ids_BT[:, 1:]).float()
    assert right[:, :63].mean() < 0.02
    assert right[:, 66:].mean() > 0.2  # one token in 4,096 by chance
