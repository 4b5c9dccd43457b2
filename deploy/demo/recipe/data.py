"""The training mixture: packed rows of prose, definitions, conversations and labelled examples.

    one row of T tokens:  [document 0 ........][document 1 ...][document 2 ....][pad]

A document sees only itself, as it will when it is served. Prose fills whole rows.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from deploy.demo.recipe import chat, tasks
from deploy.demo.recipe.sources import Text, read_texts
from deploy.demo.recipe.tokenizer import END_OF_TEXT, IM_END, IM_START
from deploy.demo.recipe.wordnet import Synset, common_words, read_synsets

PAD_ID = END_ID = 0
PROSE_SHARE = 0.45  # of the rows; the other rows are packed from the kinds below
NOVEL_SHARE = 0.55  # of the prose
# Of the tokens of the packed rows, and the mean tokens of a document.
KIND_SHARES = {"gloss": 0.06, "repeat": 0.13, "chat": 0.40, "topics": 0.07, "entities": 0.17, "answers": 0.17}
KIND_TOKENS = {"gloss": 25, "repeat": 130, "chat": 65, "topics": 18, "entities": 20, "answers": 70}
PROMPT_WEIGHT = 0.2  # of the language-model loss on what a user says, and on entity templates
ROW_LENGTHS = ((256, 0.72), (512, 0.16), (1024, 0.08), (2048, 0.04))


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    ids: list[int]
    lm_weights: list[float]  # of predicting each token, ids[0] never counts
    topic: int | None = None
    entity_labels: list[int] | None = None
    answer: tuple[int, int] | None = None  # first and last token


@dataclass(slots=True, kw_only=True)
class Batch:
    """B rows of T tokens. Flat positions are row * T + column."""

    ids_BT: Tensor
    document_BT: Tensor
    lm_weights_BT: Tensor  # weight of predicting ids_BT[:, t + 1] from position t
    topics: list[tuple[int, int]] = field(default_factory=list)  # (flat position, label)
    entities: list[tuple[int, int]] = field(default_factory=list)
    answers: list[tuple[int, int, int, int]] = field(default_factory=list)  # flat [begin, end), first, last


@dataclass(slots=True, kw_only=True)
class Corpus:
    """Everything read, in its two parts."""

    train_texts: list[Text]
    held_out_texts: list[Text]
    words: list[tuple[str, Synset]]  # the words that conversations ask about
    train_synsets: list[Synset]
    held_out_synsets: list[Synset]
    train_names: tasks.Names
    held_out_names: tasks.Names


def read_corpus(data: Path) -> Corpus:
    texts = read_texts(data)
    by_key = read_synsets(data)
    words = common_words(data, by_key, chat.NUM_COMMON_WORDS)
    common = {synset.key for _, synset in words}
    synsets = [synset for synset in by_key.values() if synset.gloss]
    return Corpus(
        train_texts=[text for text in texts if not text.is_held_out],
        held_out_texts=[text for text in texts if text.is_held_out],
        words=words[: chat.NUM_CHAT_WORDS],
        train_synsets=[s for s in synsets if not s.is_held_out or s.key in common],
        held_out_synsets=[s for s in synsets if s.is_held_out and s.key not in common],
        train_names=tasks.collect_names(synsets, held_out=False),
        held_out_names=tasks.collect_names(synsets, held_out=True),
    )


def gloss_line(word: str, synset: Synset) -> str:
    return f"{word}: {synset.gloss}."


class Encoder:
    """Turns texts, conversations and labelled examples into documents."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, text: str) -> Document:
        ids = [*self.tokenizer.encode(text).ids, END_ID]
        return Document(ids=ids, lm_weights=[1.0] * len(ids))

    def conversation(self, turns: list[chat.Turn]) -> Document:
        ids, weights = [], []
        for turn in turns:
            head = self.tokenizer.encode(f"{IM_START}{turn.role}\n").ids
            body = self.tokenizer.encode(f"{turn.content}{IM_END}").ids
            tail = self.tokenizer.encode("\n").ids
            body_weight = 1.0 if turn.role == "assistant" else PROMPT_WEIGHT
            ids += head + body + tail
            weights += [0.0] * len(head) + [body_weight] * len(body) + [0.0] * len(tail)
        return Document(ids=ids, lm_weights=weights)

    def example(self, example: tasks.Example) -> Document:
        encoding = self.tokenizer.encode(example.text)
        topic = entity_labels = answer = None
        weight = 1.0
        if example.topic is not None:
            topic = tasks.TOPIC_LABELS.index(example.topic)
        if example.entities is not None:
            weight = PROMPT_WEIGHT
            entity_labels = [0] * len(encoding.ids)
            for span in example.entities:
                first, last = tokens_of(encoding.offsets, span)
                for token_idx in range(first, last + 1):
                    prefix = "B" if token_idx == first else "I"
                    entity_labels[token_idx] = tasks.ENTITY_LABELS.index(f"{prefix}-{span.label}")
        if example.answer is not None:
            answer = tokens_of(encoding.offsets, example.answer)
        return Document(
            ids=encoding.ids,
            lm_weights=[weight] * len(encoding.ids),
            topic=topic,
            entity_labels=entity_labels,
            answer=answer,
        )


def tokens_of(offsets: list[tuple[int, int]], span: tasks.Span) -> tuple[int, int]:
    """The first and the last token that overlap the span."""
    inside = [idx for idx, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
    return inside[0], inside[-1]


class Mixture:
    """An endless source of batches. Each rank has its own."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, *, seed: int, rank: int = 0) -> None:
        self.corpus, self.encoder = corpus, Encoder(tokenizer)
        self.rng = random.Random(f"{seed} {rank}")
        self.length_rng = random.Random(seed)  # the same on all ranks: long rows cost more, and all ranks wait
        novels = [text for text in corpus.train_texts if text.is_novel]
        speeches = [text for text in corpus.train_texts if not text.is_novel]
        self.novels, self.speeches = self.join(novels), self.join(speeches)
        self.answerable = [s for s in corpus.train_synsets if tasks.is_answerable(s)]
        by_topic: dict[str, list[Synset]] = {}
        for synset in corpus.train_synsets:
            if tasks.is_topical(synset):
                by_topic.setdefault(synset.topic, []).append(synset)
        self.topical = list(by_topic.values())
        self.topic_draw_weights = [len(synsets) ** 0.5 for synsets in self.topical]
        self.kinds = list(KIND_SHARES)
        self.kind_draw_weights = [KIND_SHARES[kind] / KIND_TOKENS[kind] for kind in self.kinds]

    def join(self, texts: list[Text]) -> np.ndarray:
        encodings = self.encoder.tokenizer.encode_batch([text.body + END_OF_TEXT for text in texts])
        return np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])

    def batch(self, num_tokens: int) -> Batch:
        lengths, weights = zip(*ROW_LENGTHS, strict=True)
        T = min(self.length_rng.choices(lengths, weights)[0], num_tokens)
        B = num_tokens // T
        batch = Batch(
            ids_BT=torch.full((B, T), PAD_ID),
            document_BT=torch.full((B, T), -1),
            lm_weights_BT=torch.zeros(B, T),
        )
        num_prose = int(B * PROSE_SHARE + self.rng.random())
        for row in range(B):
            if row < num_prose:
                batch.ids_BT[row] = torch.from_numpy(self.prose(T))
                batch.document_BT[row] = 0
                batch.lm_weights_BT[row, :-1] = 1.0
            else:
                self.pack(batch, row)
        return batch

    def prose(self, num_tokens: int) -> np.ndarray:
        stream = self.novels if self.rng.random() < NOVEL_SHARE else self.speeches
        start = self.rng.randrange(len(stream) - num_tokens)
        return stream[start : start + num_tokens].astype(np.int64)

    def pack(self, batch: Batch, row: int) -> None:
        """Fill the row with documents; the first that does not fit ends it."""
        T = batch.ids_BT.shape[1]
        column = document_idx = 0
        while True:
            document = self.document()
            size = len(document.ids)
            if column + size > T:
                return
            end = column + size
            batch.ids_BT[row, column:end] = torch.tensor(document.ids)
            batch.document_BT[row, column:end] = document_idx
            batch.lm_weights_BT[row, column : end - 1] = torch.tensor(document.lm_weights[1:])
            begin = row * T + column
            if document.topic is not None:
                batch.topics.append((begin + size - 1, document.topic))
            if document.entity_labels is not None:
                batch.entities += [(begin + idx, label) for idx, label in enumerate(document.entity_labels)]
            if document.answer is not None:
                batch.answers.append((begin, begin + size, begin + document.answer[0], begin + document.answer[1]))
            column, document_idx = end, document_idx + 1

    def document(self) -> Document:
        rng = self.rng
        match rng.choices(self.kinds, self.kind_draw_weights)[0]:
            case "gloss":
                synset = rng.choice(self.corpus.train_synsets)
                return self.encoder.text(gloss_line(rng.choice(synset.words), synset))
            case "repeat":
                return self.encoder.text(self.repeated_glosses())
            case "chat":
                return self.encoder.conversation(self.conversation())
            case "topics":
                synset = rng.choice(rng.choices(self.topical, self.topic_draw_weights)[0])
                return self.encoder.example(tasks.topic_examples([synset])[0])
            case "entities":
                return self.encoder.example(tasks.entity_example(rng, self.corpus.train_names, held_out=False))
            case _:
                return self.encoder.example(tasks.answer_example(rng, self.answerable))

    def repeated_glosses(self) -> str:
        """A few definitions, then the same in another order: teaches to look back, which answers need."""
        synsets = self.rng.sample(self.answerable, self.rng.randint(2, 4))
        again = self.rng.sample(synsets, len(synsets))
        return "\n".join(f"- {gloss_line(synset.words[0], synset)}" for synset in synsets + again)

    def conversation(self) -> list[chat.Turn]:
        form = self.rng.random()
        if form < 0.80:
            return chat.definition_conversation(self.rng, self.corpus.words)
        if form < 0.90:
            return chat.small_talk_conversation(self.rng, self.corpus.words)
        return chat.reading_conversation(self.rng, self.answerable)


def tokenizer_texts(corpus: Corpus) -> list[str]:
    """What the tokenizer is trained on: all training text once."""
    glosses = [gloss_line(synset.words[0], synset) for synset in corpus.train_synsets]
    return [text.body for text in corpus.train_texts] + glosses
