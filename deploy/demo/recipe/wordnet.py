"""Read WordNet 3.0's database files (formats: wndb(5WN), senseidx(5WN))."""

import re
from dataclasses import dataclass
from pathlib import Path

from deploy.demo.recipe.sources import is_held_out, sense_index_directory, wordnet_directory

LEXICOGRAPHER_FILES = [
    "adj.all",
    "adj.pert",
    "adv.all",
    "noun.Tops",
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.attribute",
    "noun.body",
    "noun.cognition",
    "noun.communication",
    "noun.event",
    "noun.feeling",
    "noun.food",
    "noun.group",
    "noun.location",
    "noun.motive",
    "noun.object",
    "noun.person",
    "noun.phenomenon",
    "noun.plant",
    "noun.possession",
    "noun.process",
    "noun.quantity",
    "noun.relation",
    "noun.shape",
    "noun.state",
    "noun.substance",
    "noun.time",
    "verb.body",
    "verb.change",
    "verb.cognition",
    "verb.communication",
    "verb.competition",
    "verb.consumption",
    "verb.contact",
    "verb.creation",
    "verb.emotion",
    "verb.motion",
    "verb.perception",
    "verb.possession",
    "verb.social",
    "verb.stative",
    "verb.weather",
    "adj.ppl",
]
EVERYDAY_FILE = Path(__file__).with_name("everyday_words.txt")  # nouns that people try, whatever their rank
EVERYDAY_RANK = 1_000_000
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True, slots=True)
class Synset:
    key: str  # "noun.02084071": part of speech and offset in its data file
    topic: str  # lexicographer file: "noun.animal"
    words: tuple[str, ...]
    gloss: str  # the definition alone, without the examples
    is_instance: bool  # a named individual: has an instance hypernym
    hypernyms: tuple[str, ...]

    @property
    def first_clause(self) -> str:
        return self.gloss.partition(";")[0]

    @property
    def is_held_out(self) -> bool:
        return is_held_out(self.key)


def read_synsets(data: Path) -> dict[str, Synset]:
    synsets = {}
    for part in PARTS_OF_SPEECH:
        with (wordnet_directory(data) / f"data.{part}").open(encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("  "):
                    synset = parse_synset(part, line)
                    synsets[synset.key] = synset
    return synsets


def parse_synset(part: str, line: str) -> Synset:
    fields, _, gloss = line.partition("|")
    tokens = fields.split()
    num_words = int(tokens[3], 16)
    words = tuple(re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in tokens[4 : 4 + 2 * num_words : 2])
    pointers = tokens[5 + 2 * num_words :]
    symbols, offsets = pointers[0::4], pointers[1::4]
    num_pointers = int(tokens[4 + 2 * num_words])
    links = list(zip(symbols[:num_pointers], offsets[:num_pointers], strict=True))
    return Synset(
        key=f"{part}.{tokens[0]}",
        topic=LEXICOGRAPHER_FILES[int(tokens[1])],
        words=words,
        gloss=definition(gloss),
        is_instance=any(symbol == "@i" for symbol, _ in links),
        hypernyms=tuple(f"{part}.{offset}" for symbol, offset in links if symbol in ("@", "@i")),
    )


def definition(gloss: str) -> str:
    """The gloss up to its first quoted example."""
    text = re.split(r';\s*"|^\s*"|\s+"[A-Z]', gloss.strip())[0]
    return " ".join(text.split()).rstrip(" ;:,")


def common_words(data: Path, synsets: dict[str, Synset], num_words: int) -> list[tuple[str, Synset]]:
    """Everyday words, then those tagged most often in WordNet's semantic concordance, each with its commonest sense.

    One sense a word, over all parts of speech, of 3 to 24 words up to the first semicolon; no names or numbers.
    """
    everyday = set(EVERYDAY_FILE.read_text("utf-8").split())
    best: dict[str, tuple[int, str]] = {}
    parts = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
    with (sense_index_directory(data) / "index.sense").open(encoding="utf-8") as lines:
        for line in lines:
            sense_key, offset, sense_number, count = line.split()
            lemma, _, rest = sense_key.partition("%")
            is_everyday = lemma in everyday and rest[0] == "1" and sense_number == "1"
            rank = EVERYDAY_RANK if is_everyday else int(count)
            if rank > best.get(lemma, (0, ""))[0]:
                best[lemma] = (rank, f"{parts[rest[0]]}.{offset}")
    ranked = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))
    chosen = []
    for lemma, (_, key) in ranked:
        synset = synsets[key]
        fits = 3 <= len(synset.first_clause.split()) <= 24 and not synset.is_instance
        if fits and re.fullmatch(r"[a-z]{3,}", lemma) and key.startswith(("noun", "verb", "adj")):
            chosen.append((lemma, synset))
    return chosen[:num_words]
