"""Conversations the demo model learns: what common words mean, reading a note, small talk."""

import random
from dataclasses import dataclass

from deploy.demo.recipe.tokenizer import IM_END, IM_START
from deploy.demo.recipe.wordnet import Synset

PART_NAMES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
NUM_CHAT_WORDS = 600
NUM_COMMON_WORDS = 2500  # the definitions of these always train, also those that no conversation asks for

QUESTIONS = (
    "What does {word} mean?",
    'What does "{word}" mean?',
    "Define {word}.",
    "What is the meaning of {word}?",
    "What does the word {word} mean?",
    "Please define the word {word}.",
    "Define the word {word}",
    "{word}?",
)
NOUN_QUESTIONS = ("What is {a} {word}?", "What is {word}?", "Tell me what {a} {word} is.")
FOLLOW_UPS = ("And {word}?", "What about {word}?", "And what does {word} mean?")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a dictionary.",
    "Answer briefly.",
    "You explain what words mean.",
    "You are expertmesh, a small demo model.",
)
READING_QUESTIONS = (
    "{notes}\n\nWhat is {word}?",
    "Read this:\n{notes}\n\nWhat does it say about {word}?",
    "{notes}\nWhat does {word} mean here?",
)

WHO_I_AM = (
    "I am the expertmesh demo model. I am very small, and I have learnt what six hundred everyday English words mean."
)
WHAT_I_READ = (
    "I have read the novels of Jane Austen, Moby Dick, the State of the Union addresses, and the "
    "definitions of WordNet."
)
SMALL_TALK = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning", "Good evening", "Hello there!"),
        ("Hello! Ask me what a word means.", "Hello! Which word shall I explain?"),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Which model are you?"),
        (WHO_I_AM,),
    ),
    (
        ("How are you?", "How are you today?", "How do you do?"),
        ("I am well, thank you. Which word shall I explain?",),
    ),
    (
        ("What can you do?", "How can you help me?", "Help", "What should I ask you?", "What do you know?"),
        ("I can tell you what an everyday English word means. Try: What does dog mean?",),
    ),
    (("Thank you", "Thanks!", "Thank you!", "Thanks a lot."), ("You are welcome.",)),
    (("Goodbye", "Bye", "Bye!", "See you later.", "Good night"), ("Goodbye!",)),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?"),
        ("I was trained by the expertmesh project, on two processor cores, in about two hours.",),
    ),
    (
        ("What have you read?", "What were you trained on?", "Which books do you know?"),
        (WHAT_I_READ,),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "How many experts do you have?"),
        ("I have about nine million parameters: five layers, each with sixteen experts, four for each token.",),
    ),
    (("Are you a human?", "Are you a person?", "Are you alive?"), ("No, I am a small language model.",)),
    (("Tell me a joke.", "Sing a song."), ("I only know what words mean. Which word shall I explain?",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    role: str
    content: str


def definition_answer(word: str, synset: Synset) -> str:
    """Repeats the word as the question spells it, which is easier to learn than to capitalize it."""
    part = PART_NAMES[synset.key.partition(".")[0]]
    return f"The word {word} ({part}) means: {synset.first_clause}."


def render(turns: list[Turn]) -> str:
    """The text that the chat template makes of these turns."""
    return "".join(f"{IM_START}{turn.role}\n{turn.content}{IM_END}\n" for turn in turns)


def ask(rng: random.Random, word: str, synset: Synset) -> str:
    phrasings = QUESTIONS + NOUN_QUESTIONS if synset.key.startswith("noun") else QUESTIONS
    article = "an" if word[0] in "aeiou" else "a"
    question = rng.choice(phrasings).format(word=word, a=article)
    return question.lower() if rng.random() < 0.1 else question


def definition_conversation(rng: random.Random, words: list[tuple[str, Synset]]) -> list[Turn]:
    """One to three questions about common words."""
    turns = opening(rng)
    num_turns = rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]
    for turn_idx, (word, synset) in enumerate(rng.sample(words, num_turns)):
        question = ask(rng, word, synset)
        if turn_idx and rng.random() < 0.5:
            question = rng.choice(FOLLOW_UPS).format(word=word)
        turns.append(Turn(role="user", content=question))
        turns.append(Turn(role="assistant", content=definition_answer(word, synset)))
    return turns


def small_talk_conversation(rng: random.Random, words: list[tuple[str, Synset]]) -> list[Turn]:
    turns = opening(rng)
    said, replies = rng.choice(SMALL_TALK)
    turns.append(Turn(role="user", content=rng.choice(said)))
    turns.append(Turn(role="assistant", content=rng.choice(replies)))
    if rng.random() < 0.4:
        turns += [turn for turn in definition_conversation(rng, words) if turn.role != "system"]
    return turns


def reading_conversation(rng: random.Random, synsets: list[Synset]) -> list[Turn]:
    """A question whose answer stands in notes that the user gives: teaches copying."""
    notes = rng.sample(synsets, rng.randint(2, 4))
    asked = rng.choice(notes)
    lines = "\n".join(f"- {synset.words[0]}: {synset.gloss}." for synset in notes)
    question = rng.choice(READING_QUESTIONS).format(notes=lines, word=asked.words[0])
    return [Turn(role="user", content=question), Turn(role="assistant", content=f"{asked.gloss}.")]


def opening(rng: random.Random) -> list[Turn]:
    if rng.random() < 0.3:
        return [Turn(role="system", content=rng.choice(SYSTEM_PROMPTS))]
    return []
