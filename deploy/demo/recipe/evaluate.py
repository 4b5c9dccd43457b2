"""Measure the exported demo model on the held-out parts, with transformers' own classes.

    python -m deploy.demo.recipe.evaluate --data DIR --demo deploy/demo --write

Prints every figure of the model card; --write also puts them into metrics.json and the card,
and writes the held-out sample that the tests read.
"""

import argparse
import difflib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from deploy.demo.recipe import chat, tasks
from deploy.demo.recipe.card import write_table
from deploy.demo.recipe.data import Corpus, Document, Encoder, gloss_line, read_corpus
from deploy.demo.recipe.sources import Text, fetch

WINDOW_TOKENS = 1024
BATCH_SIZE = 32
NUM_GLOSSES, NUM_SENTENCES, NUM_QUESTIONS = 1000, 1000, 600
NEARLY_EQUAL = 0.85  # difflib ratio of the characters
RECALL_QUESTIONS = ("What does {word} mean?", "Define {word}.")
SAMPLE_SOURCES, SAMPLE_CHARACTERS = ("austen/Mansfield", "austen/Pride", "moby-dick", "sotu"), 1500


def evaluate(data: Path, demo: Path) -> Iterator[tuple[str, float]]:
    """Each figure's name and value, as soon as it is known."""
    training = json.loads((demo / "training.json").read_text("utf-8"))
    yield "training, million tokens", training["num_tokens"] / 1e6
    yield "training, minutes", training["elapsed_s"] / 60
    corpus = read_corpus(data)
    encoder = Encoder(Tokenizer.from_file(str(demo / "model/tokenizer.json")))
    model = AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32)
    yield "backbone, million parameters", model.num_parameters() / 1e6
    novels = [text for text in corpus.held_out_texts if text.is_novel]
    speeches = [text for text in corpus.held_out_texts if not text.is_novel]
    yield "held-out novels, bits per byte", prose_bits_per_byte(model, encoder, novels)
    yield "held-out speeches, bits per byte", prose_bits_per_byte(model, encoder, speeches)
    yield "held-out prose, bits per byte", prose_bits_per_byte(model, encoder, novels + speeches)
    yield "held-out definitions, bits per byte", gloss_bits_per_byte(model, encoder, corpus)
    exact, near = chat_recall(model, AutoTokenizer.from_pretrained(demo / "model"), corpus)
    yield "chat words answered exactly", exact
    yield "chat words answered nearly", near
    yield from topic_figures(demo, encoder, corpus)
    yield from entity_figures(demo, encoder, corpus)
    yield "answers, exact match", answer_exact_match(demo, encoder, corpus)


@torch.inference_mode()
def prose_bits_per_byte(model: PreTrainedModel, encoder: Encoder, texts: list[Text]) -> float:
    """Windows that share one token, so that every token but a text's first is predicted once."""
    total_nll = num_bytes = 0.0
    for text in texts:
        ids = encoder.tokenizer.encode(text.body).ids
        num_bytes += len(text.body.encode()) - len(encoder.tokenizer.decode(ids[:1]).encode())
        for start in range(0, len(ids) - 1, WINDOW_TOKENS - 1):
            window = torch.tensor([ids[start : start + WINDOW_TOKENS]])
            logits = model(window).logits[0, :-1]
            total_nll += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return total_nll / math.log(2) / num_bytes


@torch.inference_mode()
def gloss_bits_per_byte(model: PreTrainedModel, encoder: Encoder, corpus: Corpus) -> float:
    """The definition given its word, as in training: `word: definition.`"""
    total_nll = num_bytes = 0.0
    for synset in corpus.held_out_synsets[:: max(1, len(corpus.held_out_synsets) // NUM_GLOSSES)]:
        line = gloss_line(synset.words[0], synset)
        word_size = len(encoder.tokenizer.encode(synset.words[0] + ":").ids)
        ids = torch.tensor([encoder.tokenizer.encode(line).ids])
        logits = model(ids).logits[0, word_size - 1 : -1]
        total_nll += torch.nn.functional.cross_entropy(logits, ids[0, word_size:], reduction="sum").item()
        num_bytes += len(line.encode()) - len(synset.words[0].encode()) - 1
    return total_nll / math.log(2) / num_bytes


@torch.inference_mode()
def chat_recall(model: PreTrainedModel, tokenizer: AutoTokenizer, corpus: Corpus) -> tuple[float, float]:
    """Greedy answers about the taught words: the share that equal, or nearly equal, the definition."""
    asked = [(RECALL_QUESTIONS[idx % 2].format(word=w), w, s) for idx, (w, s) in enumerate(corpus.words)]
    num_exact = num_near = 0
    for start in range(0, len(asked), 4 * BATCH_SIZE):
        part = asked[start : start + 4 * BATCH_SIZE]
        answers = greedy_answers(model, tokenizer, [question for question, _, _ in part])
        for answer, (_, word, synset) in zip(answers, part, strict=True):
            expected = chat.definition_answer(word, synset)
            num_exact += answer == expected
            num_near += difflib.SequenceMatcher(None, answer, expected).ratio() >= NEARLY_EQUAL
    return num_exact / len(asked), num_near / len(asked)


def greedy_answers(model: PreTrainedModel, tokenizer: AutoTokenizer, questions: list[str]) -> list[str]:
    tokenizer.padding_side = "left"
    conversations = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompts, max_new_tokens=48, do_sample=False, repetition_penalty=1.0)
    return tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def topic_figures(demo: Path, encoder: Encoder, corpus: Corpus) -> Iterator[tuple[str, float]]:
    model = AutoModelForSequenceClassification.from_pretrained(demo / "topics", dtype=torch.float32)
    examples = tasks.topic_examples([s for s in corpus.held_out_synsets if tasks.is_topical(s)])
    documents = [encoder.example(example) for example in examples]
    hits: dict[int, list[bool]] = {}
    for document, logits in zip(documents, batched_logits(model, documents), strict=True):
        hits.setdefault(document.topic, []).append(int(logits.argmax()) == document.topic)
    yield "topics, accuracy", sum(map(sum, hits.values())) / len(documents)
    yield "topics, mean accuracy over the topics", sum(sum(h) / len(h) for h in hits.values()) / len(hits)


def entity_figures(demo: Path, encoder: Encoder, corpus: Corpus) -> Iterator[tuple[str, float]]:
    model = AutoModelForTokenClassification.from_pretrained(demo / "entities", dtype=torch.float32)
    for templates, held_out in (("new names in new sentences", True), ("new names in known sentences", False)):
        rng = random.Random(0)
        examples = [tasks.entity_example(rng, corpus.held_out_names, held_out=held_out) for _ in range(NUM_SENTENCES)]
        documents = [encoder.example(example) for example in examples]
        num_right = num_found = num_true = 0
        for document, logits in zip(documents, batched_logits(model, documents), strict=True):
            found = entity_spans(logits[: len(document.ids)].argmax(-1).tolist())
            true = entity_spans(document.entity_labels)
            num_right += len(found & true)
            num_found += len(found)
            num_true += len(true)
        yield f"entities, F1, {templates}", 2 * num_right / max(1, num_found + num_true)


def entity_spans(label_ids: list[int]) -> set[tuple[int, int, str]]:
    """(first token, last token, kind) of each B-I-I run; an I without its B begins nothing."""
    spans: set[tuple[int, int, str]] = set()
    current = None
    for token_idx, label_id in enumerate([*label_ids, 0]):
        prefix, _, kind = tasks.ENTITY_LABELS[label_id].partition("-")
        if current is not None and not (prefix == "I" and kind == current[1]):
            spans.add((current[0], token_idx - 1, current[1]))
            current = None
        if prefix == "B":
            current = (token_idx, kind)
    return spans


def answer_exact_match(demo: Path, encoder: Encoder, corpus: Corpus) -> float:
    model = AutoModelForQuestionAnswering.from_pretrained(demo / "answers", dtype=torch.float32)
    rng = random.Random(0)
    pool = [s for s in corpus.held_out_synsets if tasks.is_answerable(s)]
    documents = [encoder.example(tasks.answer_example(rng, pool)) for _ in range(NUM_QUESTIONS)]
    num_right = 0
    for document, logits in zip(documents, batched_logits(model, documents), strict=True):
        num_right += best_span(logits[: len(document.ids)]) == document.answer
    return num_right / len(documents)


def best_span(logits: torch.Tensor, max_tokens: int = 64) -> tuple[int, int]:
    """The likeliest (first, last) with first <= last, at most max_tokens long; logits are [T, 2]."""
    scores = logits[:, None, 0] + logits[None, :, 1]
    allowed = torch.ones_like(scores).triu().tril(max_tokens - 1).bool()
    return divmod(int(scores.masked_fill(~allowed, float("-inf")).argmax()), len(logits))


@torch.inference_mode()
def batched_logits(model: PreTrainedModel, documents: list[Document]) -> Iterator[torch.Tensor]:
    """Each document's logits; those of questions as [T, 2]. Right padding changes nothing for a causal model."""
    for start in range(0, len(documents), BATCH_SIZE):
        part = documents[start : start + BATCH_SIZE]
        width = max(len(document.ids) for document in part)
        ids = torch.tensor([document.ids + [0] * (width - len(document.ids)) for document in part])
        output = model(ids)
        if "start_logits" in output:
            yield from torch.stack((output.start_logits, output.end_logits), dim=-1)
        else:
            yield from output.logits


def write_figures(figures: dict[str, float], demo: Path) -> None:
    (demo / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    rows = [f"| {name} | {value:.3f} |" for name, value in figures.items()]
    write_table(demo / "MODEL_CARD.md", "figures", ["| figure | value |", "| --- | --- |", *rows])


def write_sample(corpus: Corpus, file: Path) -> None:
    """The beginnings of some held-out texts, for a test that has none of the data."""
    texts = [next(t for t in corpus.held_out_texts if t.name.startswith(source)) for source in SAMPLE_SOURCES]
    file.write_text("\n\n".join(text.body[:SAMPLE_CHARACTERS] for text in texts) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--demo", type=Path, required=True, help="the exported directories")
    parser.add_argument("--write", action="store_true", help="also write metrics.json and the card")
    arguments = parser.parse_args()
    fetch(arguments.data)
    figures = {}
    for name, value in evaluate(arguments.data, arguments.demo):
        figures[name] = round(value, 4)
        print(f"{name}: {value:.4f}", flush=True)
    if arguments.write:
        write_figures(figures, arguments.demo)
        write_sample(read_corpus(arguments.data), arguments.demo / "held_out_sample.txt")


if __name__ == "__main__":
    main()
