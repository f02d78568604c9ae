"""The quickstart's data: questions, demonstrations and preferences, all made here from a seed.

A *fact* is an item and its answer ("France", "Paris"). A *family* words its facts ("the capital of France").
A *question* is one fact in one of many wordings; the wordings are what the held-out split separates:
every fact is seen in training, no held-out prompt is.

Demonstrations mostly ramble and sometimes answer in one short sentence, so a base trained on them knows the
answers and buries them. Preferences put the short correct answer first. `satisfies` is the rule behind that
preference, and it can judge any generation:

    >>> satisfies("What is the capital of France?", "The capital of France is Paris.")
    True
    >>> satisfies("What is the capital of France?", "Oh, I am glad you asked. I believe it is Paris.")
    False

Only the standard library is used. The same seed gives the same rows on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TypedDict

MAX_WORDS = 12
"""`satisfies` takes one sentence of at most this many words. The longest short answer made here has 9."""

HELD_OUT_PER_FACT = 4
"""Wordings of each fact that no demonstration and no training pair uses."""

WRONG_SHARE = 0.05
"""Share of the pairs whose rejected side is short but wrong; in the others it is right but rambles."""

SHORT_SHARE = 0.35
"""Share of the demonstrations that are short, for an ordinary question."""

SHORT_SHARE_IF_QUICK = 0.7
"""The same, for a question that opens with QUICK: the base has learned to be brief there, now and then."""

QUICK = "Quick question: "
OPENINGS = ("", QUICK, "Hello! ", "Good morning! ", "One more thing: ", "I have been wondering: ")
ASKS = (
    "what is {topic}?",
    "can you tell me {topic}?",
    "do you know {topic}?",
    "could you remind me of {topic}?",
)


class Message(TypedDict):
    """One turn of a chat; role is "user" or "assistant"."""

    role: str
    content: str


class Demonstration(TypedDict):
    """A conversation to imitate: a user's message, then the assistant's."""

    messages: list[Message]


class PreferenceRow(TypedDict):
    """A prompt and two responses; chosen satisfies the rule and rejected doesn't."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Family:
    """Facts of one kind, item → answer, and how to word them.

    topic names what is asked; asks are ways to ask beside ASKS; short is a way to answer beside "{topic} is {answer}".
    """

    topic: str
    asks: tuple[str, ...]
    short: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Question:
    """One fact of a family, asked in one wording."""

    family: Family
    item: str
    prompt: str

    @property
    def topic(self) -> str:
        return self.family.topic.format(item=self.item)

    @property
    def answer(self) -> str:
        return self.family.facts[self.item]

    @property
    def rivals(self) -> list[str]:
        """The family's wrong answers to this question, sorted; none occurs in the prompt."""
        answers = set(self.family.facts.values()) - {self.answer}
        return sorted(answer for answer in answers if not _mentions(self.prompt, answer))


def demonstrations(seed: int, count: int) -> list[Demonstration]:
    """`count` conversations to train the base on. They never use a held-out prompt of the same seed."""
    rng = Random(f"demonstrations {seed}")
    rows: list[Demonstration] = []
    for question in _endless(_split(seed)[0], rng, count):
        share = SHORT_SHARE_IF_QUICK if question.prompt.startswith(QUICK) else SHORT_SHARE
        response = _short(question, question.answer, rng) if rng.random() < share else _ramble(question, rng)
        user: Message = {"role": "user", "content": question.prompt}
        rows.append({"messages": [user, {"role": "assistant", "content": response}]})
    return rows


def preference_rows(
    seed: int, count: int, held_out: int = 200
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """`count` pairs to train on and `held_out` pairs to evaluate on.

    No two rows of one list share a prompt while there are prompts left. The prompts of the held-out pairs
    occur neither in the training pairs nor in the demonstrations of the same seed, however many are made.
    """
    rng = Random(f"preferences {seed}")
    training, evaluation = _split(seed)
    train_rows = [_pair(question, rng) for question in _endless(training, rng, count)]
    return train_rows, [_pair(question, rng) for question in _endless(evaluation, rng, held_out)]


def satisfies(prompt: str, response: str) -> bool:
    """Whether `response` is one sentence of at most MAX_WORDS words that gives the right answer and no other.

    Raises KeyError for a prompt that `questions` doesn't make.
    """
    question = _by_prompt()[prompt]
    response = response.strip()
    if len(response.split()) > MAX_WORDS or re.search(r"[.!?]\s|\n", response):
        return False
    return _mentions(response, question.answer) and not any(_mentions(response, r) for r in question.rivals)


def questions() -> list[Question]:
    """Every question there is, each fact in every wording, in a fixed order; prompts are unique."""
    return [
        Question(family, item, _after(opening, ask.format(item=item, topic=family.topic.format(item=item))))
        for family in FAMILIES
        for item in family.facts
        for opening in OPENINGS
        for ask in ASKS + family.asks
    ]


@cache
def _by_prompt() -> dict[str, Question]:
    return {question.prompt: question for question in questions()}


@cache
def _split(seed: int) -> tuple[list[Question], list[Question]]:
    """All questions as (training, held out): of each fact, HELD_OUT_PER_FACT random wordings are held out."""
    rng = Random(f"split {seed}")
    wordings: dict[tuple[str, str], list[Question]] = {}
    for question in questions():
        wordings.setdefault((question.family.topic, question.item), []).append(question)
    training: list[Question] = []
    held_out: list[Question] = []
    for group in wordings.values():
        rng.shuffle(group)
        held_out += group[:HELD_OUT_PER_FACT]
        training += group[HELD_OUT_PER_FACT:]
    return training, held_out


def _endless(pool: list[Question], rng: Random, count: int) -> Iterator[Question]:
    """`count` questions of the pool in random order; each is used once before any is used again."""
    order: list[Question] = []
    for _ in range(count):
        if not order:
            order = rng.sample(pool, len(pool))
        yield order.pop()


def _pair(question: Question, rng: Random) -> PreferenceRow:
    chosen = _short(question, question.answer, rng)
    if rng.random() < WRONG_SHARE:
        rejected = _short(question, rng.choice(question.rivals), rng)
    else:
        rejected = _ramble(question, rng)
    return {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}


def _short(question: Question, answer: str, rng: Random) -> str:
    return _after("", _statement(question, answer, rng)) + "."


def _ramble(question: Question, rng: Random) -> str:
    """Several sentences with the right answer somewhere among them; drawn from the grammar below."""
    statement = _statement(question, question.answer, rng)
    sentences = [rng.choice(STARTING), rng.choice(ANSWERING).format(statement=statement)]
    if rng.random() < 0.3:
        sentences.insert(1, rng.choice(RESTATING).format(topic=question.topic))
    if rng.random() < 0.5:
        sentences.append(rng.choice(DIGRESSING))
    if rng.random() < 0.5:
        sentences.append(rng.choice(CLOSING))
    return " ".join(sentences)


def _statement(question: Question, answer: str, rng: Random) -> str:
    """The answer as a clause that starts in lower case unless a name comes first."""
    form = rng.choice(("{topic} is {answer}", question.family.short))
    return form.format(item=question.item, topic=question.topic, answer=answer)


def _after(opening: str, clause: str) -> str:
    """The clause behind an opening; it begins in upper case unless a colon comes before it."""
    return opening + (clause if opening.endswith(": ") else clause[0].upper() + clause[1:])


def _mentions(text: str, phrase: str) -> bool:
    return re.search(rf"\b{re.escape(phrase)}\b", text, re.IGNORECASE) is not None


# The grammar of a ramble: start, perhaps restate the question, answer, perhaps digress, perhaps close.

STARTING = (
    "Well, that is a lovely question!",
    "Well, where should I begin?",
    "Oh, what a nice thing to wonder about!",
    "Oh, I was thinking about that only yesterday.",
)
RESTATING = (
    "You would like to know {topic}.",
    "So we are talking about {topic} today.",
)
ANSWERING = (
    "I am no expert, but I believe that {statement}.",
    "If I remember correctly, {statement}.",
    "As far as I know, {statement}, although you may want to check.",
    "Most people would tell you that {statement}.",
)
DIGRESSING = (
    "My neighbour once told me a long story about it.",
    "It reminds me of a rainy day in the library.",
    "It is funny how the small things stay with us.",
)
CLOSING = (
    "Sorry for going on for so long!",
    "Anyway, please feel free to ask me again!",
    "I could say more, but I should stop here.",
)


def _facts(text: str) -> dict[str, str]:
    """{"France": "Paris", …} from "France Paris, …": the answer is the last word."""
    return {item: answer for item, answer in (pair.strip().rsplit(" ", 1) for pair in text.split(","))}


def _neighbours(names: str) -> dict[str, str]:
    """{"day after Monday": "Tuesday", "day before Monday": "Sunday", …} from a cycle of days."""
    cycle = names.split()
    after = {f"day after {name}": cycle[(i + 1) % len(cycle)] for i, name in enumerate(cycle)}
    return after | {f"day before {name}": cycle[i - 1] for i, name in enumerate(cycle)}


FAMILIES = (
    Family(
        "the capital of {item}",
        ("which city is the capital of {item}?", "what is the name of the capital of {item}?"),
        "it is {answer}",
        _facts(
            "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Greece Athens, "
            "Norway Oslo, Sweden Stockholm, Denmark Copenhagen, Ireland Dublin, Poland Warsaw, Japan Tokyo, "
            "Thailand Bangkok, Egypt Cairo, Kenya Nairobi, Ghana Accra, Canada Ottawa, Cuba Havana, Peru Lima"
        ),
    ),
    Family(
        "the opposite of {item}",
        ("which word means the opposite of {item}?", "what is a word for the opposite of {item}?"),
        "it is {answer}",
        _facts(
            "hot cold, big small, fast slow, tall short, early late, full empty, happy sad, light dark, loud quiet, "
            "old young, open closed, rich poor, hard soft, strong weak, sweet sour, thick thin, wet dry, wide narrow, "
            "near far, high low"
        ),
    ),
    Family(
        "the colour of {item}",
        ("what colour is {item}?", "which colour does {item} have?"),
        "{item} is {answer}",
        _facts(
            "a lemon yellow, a banana yellow, the sun yellow, a canary yellow, grass green, a frog green, "
            "spinach green, snow white, milk white, a swan white, coal black, a raven black, a tomato red, "
            "a cherry red, a ladybird red, the sky blue, a sapphire blue, a carrot orange, a pumpkin orange, "
            "chocolate brown, a flamingo pink, a plum purple, an elephant grey"
        ),
    ),
    Family(
        "the {item}",
        ("which is the {item}?", "what do we call the {item}?"),
        "it is {answer}",
        _neighbours("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    ),
    Family(
        "the plural of {item}",
        ("how do I write the plural of {item}?", "which word is the plural of {item}?"),
        "we write {answer}",
        _facts(
            "mouse mice, goose geese, foot feet, tooth teeth, child children, man men, woman women, ox oxen, "
            "leaf leaves, wolf wolves, knife knives, city cities, baby babies, box boxes, hero heroes, story stories"
        ),
    ),
    Family(
        "the past tense of {item}",
        ("how do I write the past tense of {item}?", "which word is the past tense of {item}?"),
        "we write {answer}",
        _facts(
            "go went, see saw, eat ate, run ran, take took, give gave, write wrote, drive drove, sing sang, "
            "swim swam, buy bought, bring brought, think thought, sleep slept, fly flew, know knew, speak spoke"
        ),
    ),
    Family(
        "the name of {item}",
        ("what is {item} called?", "what do people call {item}?"),
        "{item} is called a {answer}",
        _facts(
            "a baby dog puppy, a baby cat kitten, a baby cow calf, a baby horse foal, a baby sheep lamb, "
            "a baby hen chick, a baby duck duckling, a baby bear cub, a baby goat kid, a baby kangaroo joey, "
            "a baby pig piglet, a baby deer fawn"
        ),
    ),
    Family(
        "the sound of {item}",
        ("what does {item} say?", "which sound does {item} make?"),
        "{item} says {answer}",
        _facts(
            "a cow moo, a dog woof, a cat meow, a duck quack, a sheep baa, a pig oink, a horse neigh, a frog ribbit, "
            "an owl hoot, a bee buzz, a snake hiss, a lion roar"
        ),
    ),
    Family(
        "the number of legs of {item}",
        ("how many legs does {item} have?", "how many legs can you count on {item}?"),
        "{item} has {answer} legs",
        _facts(
            "a spider eight, an ant six, a bee six, a horse four, a dog four, a cow four, a hen two, a swan two"
        ),
    ),
)
