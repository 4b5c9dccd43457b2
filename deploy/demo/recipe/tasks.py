"""Labelled examples for the three task heads, made from WordNet.

topics:   a definition -> what kind of thing it defines (one of eight)
entities: a sentence   -> PER / LOC / ORG in BIO form, per token
answers:  a question, then notes -> the span of the notes that answers it

A causal model tags a token by its left context alone. So the question comes before the
notes, an answer ends with its full stop, and a sentence says something before it names.
"""

import random
import re
from dataclasses import dataclass, field

from deploy.demo.recipe import entity_sentences as sentences
from deploy.demo.recipe.sources import is_held_out
from deploy.demo.recipe.wordnet import Synset

TOPICS = {
    "noun.animal": "animal",
    "noun.plant": "plant",
    "noun.food": "food",
    "noun.body": "body",
    "noun.person": "person",
    "noun.location": "place",
    "noun.artifact": "object",
    "noun.act": "action",
}
TOPIC_LABELS = tuple(TOPICS.values())
ENTITY_LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")
QUESTION_FORMS = ("What is {word}?", "What does {word} mean?", "What is the meaning of {word}?", "Define {word}.")
# A word behind a space is the same tokens as in the question; at the start of a line it is not, which is harder.
NOTE_FORMS = ("- {word}: {gloss}.", "The word {word} means {gloss}.", "A {word} is {gloss}.", "{word}: {gloss}.")
NOTE_FORM_SHARES = (0.4, 0.2, 0.2, 0.2)
MAX_GLOSS_WORDS = 14
OPENING_SHARE = 0.1  # of the training sentences, put behind an opening phrase
GRAMMAR_SHARE, PLAIN_SHARE = 0.55, 0.10  # of the training sentences; plain ones name nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Characters [start, end) of the text, and what they are."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    text: str
    topic: str | None = None
    entities: tuple[Span, ...] | None = None
    answer: Span | None = None


@dataclass(slots=True, kw_only=True)
class Names:
    """Names of persons, places and organisations, and the ordinary words around them."""

    persons: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    organisations: list[str] = field(default_factory=list)
    things: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    plain_sentences: list[str] = field(default_factory=list)


def topic_examples(synsets: list[Synset]) -> list[Example]:
    return [Example(text=synset.gloss, topic=TOPICS[synset.topic]) for synset in synsets if is_topical(synset)]


def is_topical(synset: Synset) -> bool:
    return synset.topic in TOPICS and len(synset.gloss.split()) >= 3


def collect_names(synsets: list[Synset], *, held_out: bool) -> Names:
    """The named individuals of WordNet whose name falls in this part of the split."""
    names = Names()
    for synset in synsets:
        if not synset.is_held_out:
            add_ordinary(names, synset)
        for word in synset.words:
            if not re.fullmatch(r"[A-Z][a-zA-Z'.]+( [A-Z][a-zA-Z'.]+){0,3}", word) or word.isupper():
                continue
            if is_held_out("name/" + word, one_in=10) != held_out:
                continue
            if synset.topic == "noun.person" and synset.is_instance and " " in word:
                names.persons.append(word)
            elif synset.topic in ("noun.location", "noun.object") and synset.is_instance:
                names.places.append(word)
            elif is_organisation(word, synset):
                names.organisations.append(word)
    return names


def add_ordinary(names: Names, synset: Synset) -> None:
    """The nouns of everyday use: the first word of a short definition's synset, in small letters."""
    if synset.gloss.islower() and len(synset.gloss.split()) > 3:
        names.plain_sentences.append(f"{synset.gloss}.")
    if not re.fullmatch("[a-z]{3,9}", synset.words[0]):
        return
    if synset.topic in ("noun.artifact", "noun.food", "noun.plant", "noun.communication", "noun.act"):
        names.things.append(synset.words[0])
    elif synset.topic == "noun.person" and not synset.is_instance:
        names.roles.append(synset.words[0])


def is_organisation(word: str, synset: Synset) -> bool:
    looks_right = " " in word and re.search(sentences.ORGANISATION_WORDS, word) is not None
    return synset.topic == "noun.group" and looks_right and not re.search(sentences.VIOLENT_ORGANISATIONS, synset.gloss)


def entity_example(rng: random.Random, names: Names, *, held_out: bool) -> Example:
    """A sentence, its slots filled from these names. The held-out forms of sentences are never drawn in training."""
    form = rng.choice(sentences.HELD_OUT_TEMPLATES) if held_out else training_form(rng, names)
    text, spans = "", []
    for piece in re.split(r"(\{[A-Z]+\})", form):
        if not piece.startswith("{"):
            text += piece
            continue
        kind = piece.strip("{}")
        name = draw_name(rng, names, kind)
        spans.append(Span(start=len(text), end=len(text) + len(name), label=kind))
        text += name
    return Example(text=text, entities=tuple(spans))


def training_form(rng: random.Random, names: Names) -> str:
    """A sentence with its slots for names still open: from the grammar, from the list, or without any."""
    kind = rng.random()
    if kind < PLAIN_SHARE:
        return capitalized(rng.choice(names.plain_sentences))
    if kind < PLAIN_SHARE + GRAMMAR_SHARE:
        form = grammar_form(rng, names)
        while capitalized(form) in sentences.HELD_OUT_TEMPLATES:
            form = grammar_form(rng, names)
    else:
        form = rng.choice(sentences.TEMPLATES)
    if rng.random() < OPENING_SHARE:
        form = f"{rng.choice(sentences.OPENINGS)} {form if form.startswith('{') else form[0].lower() + form[1:]}"
    return capitalized(form)


def grammar_form(rng: random.Random, names: Names) -> str:
    parts = [rng.choice(sentences.SUBJECTS), rng.choice(sentences.CLAUSES)]
    parts += rng.sample(sentences.TAILS, rng.choice((0, 1, 1, 2)))
    ordinary = {slot: words.split() for slot, words in sentences.WORDS.items()}
    ordinary |= {"thing": names.things, "person": names.roles}

    def fill(slot: re.Match[str]) -> str:
        return rng.choice(ordinary[slot[1]]).replace("_", " ")

    return re.sub(r"\{([a-z_]+)\}", fill, " ".join(parts)) + "."


def capitalized(form: str) -> str:
    return form[0].upper() + form[1:]


def draw_name(rng: random.Random, names: Names, kind: str) -> str:
    if kind == "LOC":
        return rng.choice(names.places)
    if kind == "PER":
        person = rng.choice(names.persons)
        if rng.random() < 0.5:
            return person
        first, last = rng.choice(names.persons).split()[0], person.split()[-1]
        return rng.choice((f"{first} {last}", first, f"{rng.choice(sentences.TITLES)} {last}"))
    if names.organisations and rng.random() < 0.4:
        return rng.choice(names.organisations)
    surname = rng.choice(names.persons).split()[-1]
    form = rng.choice(sentences.ORGANISATION_FORMS)
    return form.format(place=rng.choice(names.places), surname=surname)


def answer_example(rng: random.Random, synsets: list[Synset]) -> Example:
    """A question about one of a few words, then a note on each; the answer is that word's gloss."""
    notes = rng.sample(synsets, rng.randint(2, 5))
    asked = rng.randrange(len(notes))
    note_form = rng.choices(NOTE_FORMS, NOTE_FORM_SHARES)[0]
    text = rng.choice(QUESTION_FORMS).format(word=notes[asked].words[0]) + "\n"
    answer = None
    for note_idx, synset in enumerate(notes):
        line = note_form.format(word=synset.words[0], gloss=synset.gloss)
        if note_idx == asked:
            start = len(text) + len(line) - len(synset.gloss) - 1
            answer = Span(start=start, end=len(text) + len(line), label="answer")
        text += line + "\n"
    return Example(text=text, answer=answer)


def is_answerable(synset: Synset) -> bool:
    num_words = len(synset.gloss.split())
    return 3 <= num_words <= MAX_GLOSS_WORDS and "." not in synset.gloss and synset.key.startswith("noun")
