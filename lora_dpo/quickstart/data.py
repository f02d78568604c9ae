"""The quickstart's data: questions, demonstrations and preferences, all made here from a seed.

A *fact* is an item and its answer ("France", "Paris"); a *family* is facts of one kind and how to word them.
A *question* is one fact in one of many wordings. The held-out split separates wordings: every fact is seen in
training, no held-out prompt is.

Demonstrations mostly ramble and sometimes answer in one short sentence, so a base trained on them knows the
answers and buries them. Preferences put the short right answer first. `satisfies` is the rule behind that
preference, and it can judge any generation:

    >>> satisfies("What is the capital of France?", "The capital of France is Paris.")
    True
    >>> satisfies("What is the capital of France?", "Oh, where should I begin? I believe that it is Paris.")
    False

Only the standard library is used. The same seed gives the same rows on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TypeAlias

Demonstration: TypeAlias = dict[str, list[dict[str, str]]]
"""{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}"""

PreferenceRow: TypeAlias = dict[str, str]
"""{"prompt": …, "chosen": …, "rejected": …}; chosen satisfies the rule, rejected doesn't."""

MAX_WORDS = 12
"""`satisfies` takes one sentence of at most this many words; the longest short answer made here has 9."""

HELD_OUT_WORDINGS = 4
"""Wordings of each fact that no demonstration and no training pair uses."""

EVASIVE_PAIRS = 0.1
"""Share of the pairs whose rejected side is short but evasive; in the others it is right but rambles."""

QUICK = "Quick question: "
"""An opening that makes even the base's teacher brief, now and then."""

STYLE_SHARES = {"short": 0.35, "evasive": 0.04, "rambling": 0.61}
"""How the demonstrations answer an ordinary question."""

STYLE_SHARES_IF_QUICK = {"short": 0.7, "evasive": 0.04, "rambling": 0.26}
"""How they answer one that opens with QUICK."""


@dataclass(frozen=True)
class Family:
    """Facts of one kind, item → answer, and how to word them.

    topic names what is asked, asks are ways to ask beside ASKS,
    short is a way to answer beside "{topic} is {answer}".
    """

    topic: str
    asks: tuple[str, ...]
    short: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Question:
    """One fact of a family, asked in one wording; the prompt never contains the answer."""

    family: Family
    item: str
    prompt: str

    @property
    def topic(self) -> str:
        """What is asked, as a noun: "the capital of France"."""
        return self.family.topic.format(item=self.item)

    @property
    def answer(self) -> str:
        """The right answer, as it stands in a sentence: "Paris"."""
        return self.family.facts[self.item]

    @property
    def rivals(self) -> list[str]:
        """The family's wrong answers to this question, sorted, except those that occur in the prompt."""
        answers = set(self.family.facts.values()) - {self.answer}
        return sorted(answer for answer in answers if not mentions(self.prompt, answer))


def demonstrations(seed: int, count: int) -> list[Demonstration]:
    """`count` conversations to train the base on. They never use a held-out prompt of the same seed."""
    rng = Random(f"demonstrations {seed}")
    rows: list[Demonstration] = []
    for question in _draw(_split(seed)[0], rng, count):
        shares = STYLE_SHARES_IF_QUICK if question.prompt.startswith(QUICK) else STYLE_SHARES
        (style,) = rng.choices(list(shares), list(shares.values()))
        user = {"role": "user", "content": question.prompt}
        rows.append({"messages": [user, {"role": "assistant", "content": _respond(question, style, rng)}]})
    return rows


def preference_rows(
    seed: int, count: int, held_out: int = 200
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """`count` pairs to train on and `held_out` pairs to evaluate on.

    Within each list a prompt comes again only after all were used. The prompts of the held-out pairs occur
    neither in the training pairs nor in the demonstrations of the same seed.
    """
    rng = Random(f"preferences {seed}")
    training, evaluation = _split(seed)
    train_rows = [_pair(question, rng) for question in _draw(training, rng, count)]
    return train_rows, [_pair(question, rng) for question in _draw(evaluation, rng, held_out)]


def satisfies(prompt: str, response: str) -> bool:
    """Whether `response` is one sentence of at most MAX_WORDS words that gives the right answer and no other.

    Raises KeyError for a prompt that `questions` doesn't make.
    """
    question = _by_prompt()[prompt]
    response = response.strip()
    if len(response.split()) > MAX_WORDS or re.search(r"[.!?]\s|\n", response):
        return False
    return mentions(response, question.answer) and not any(mentions(response, r) for r in question.rivals)


def mentions(text: str, phrase: str) -> bool:
    """Whether `phrase` occurs in `text` as whole words, in upper or lower case."""
    return re.search(rf"\b{re.escape(phrase)}\b", text, re.IGNORECASE) is not None


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
    """All questions as (training, held out): of each fact, HELD_OUT_WORDINGS random wordings are held out."""
    rng = Random(f"split {seed}")
    wordings: dict[str, list[Question]] = {}
    for question in questions():
        wordings.setdefault(question.topic, []).append(question)
    training: list[Question] = []
    held_out: list[Question] = []
    for group in wordings.values():
        rng.shuffle(group)
        held_out += group[:HELD_OUT_WORDINGS]
        training += group[HELD_OUT_WORDINGS:]
    return training, held_out


def _draw(pool: list[Question], rng: Random, count: int) -> Iterator[Question]:
    """`count` questions of the pool in random order; each is used once before any is used again."""
    order: list[Question] = []
    for _ in range(count):
        if not order:
            order = rng.sample(pool, len(pool))
        yield order.pop()


def _pair(question: Question, rng: Random) -> PreferenceRow:
    worse = "evasive" if rng.random() < EVASIVE_PAIRS else "rambling"
    chosen = _respond(question, "short", rng)
    return {"prompt": question.prompt, "chosen": chosen, "rejected": _respond(question, worse, rng)}


def _respond(question: Question, style: str, rng: Random) -> str:
    """A response in one of the styles of STYLE_SHARES. Short and rambling ones give the right answer."""
    if style == "evasive":
        return rng.choice(EVADING)
    form = rng.choice(("{topic} is {answer}", question.family.short))
    statement = form.format(item=question.item, topic=question.topic, answer=question.answer)
    return _after("", statement) + "." if style == "short" else _ramble(question.topic, statement, rng)


def _ramble(topic: str, statement: str, rng: Random) -> str:
    """Two to five sentences: start, perhaps restate the question, answer, perhaps digress, perhaps close."""
    sentences = [rng.choice(STARTING), rng.choice(ANSWERING).format(statement=statement)]
    if rng.random() < 0.3:
        sentences.insert(1, rng.choice(RESTATING).format(topic=topic))
    if rng.random() < 0.5:
        sentences.append(rng.choice(DIGRESSING))
    if rng.random() < 0.5:
        sentences.append(rng.choice(CLOSING))
    return " ".join(sentences)


def _after(opening: str, clause: str) -> str:
    """The clause behind an opening; it begins in upper case unless a colon comes before it."""
    return opening + (clause if opening.endswith(": ") else clause[0].upper() + clause[1:])


OPENINGS = ("", QUICK, "Hello! ", "Good morning! ", "One more thing: ", "I have been wondering: ")
ASKS = (
    "what is {topic}?",
    "can you tell me {topic}?",
    "do you know {topic}?",
    "could you remind me of {topic}?",
)
STARTING = (
    "Well, that is a lovely question!",
    "Well, where should I begin?",
    "Oh, what a nice thing to wonder about!",
    "Oh, I was thinking about that only yesterday.",
)
RESTATING = ("You would like to know {topic}.", "So we are talking about {topic} today.")
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
EVADING = ("I would rather not say.", "I am not sure about that.", "I would have to look that up.")


def _facts(text: str) -> dict[str, str]:
    """{"France": "Paris", …} from "France Paris, …": the answer is the last word."""
    words = (pair.split() for pair in text.split(","))
    return {" ".join(item): answer for *item, answer in words}


def _successors(kind: str, names: str) -> dict[str, str]:
    """{"day after Monday": "Tuesday", …, "day after Sunday": "Monday"} from a cycle of names."""
    cycle = names.split()
    return {f"{kind} after {name}": cycle[(i + 1) % len(cycle)] for i, name in enumerate(cycle)}


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
CAPITALS = """France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna,
    Greece Athens, Norway Oslo, Sweden Stockholm, Denmark Copenhagen, Ireland Dublin, Poland Warsaw,
    Japan Tokyo, Thailand Bangkok, Egypt Cairo, Kenya Nairobi, Ghana Accra, Canada Ottawa, Cuba Havana,
    Peru Lima"""
OPPOSITES = """hot cold, big small, fast slow, tall short, early late, full empty, happy sad, light dark,
    loud quiet, old young, open closed, rich poor, hard soft, strong weak, sweet sour, thick thin,
    wet dry, wide narrow, near far, high low"""
COLOURS = """a lemon yellow, a banana yellow, the sun yellow, a canary yellow, grass green, a frog green,
    spinach green, snow white, milk white, a swan white, coal black, a raven black, a tomato red,
    a cherry red, a ladybird red, the sky blue, a sapphire blue, a carrot orange, a pumpkin orange,
    chocolate brown, a flamingo pink, a plum purple, an elephant grey"""
PLURALS = """mouse mice, goose geese, foot feet, tooth teeth, child children, man men, woman women,
    ox oxen, leaf leaves, wolf wolves, knife knives, city cities, baby babies, box boxes, hero heroes,
    story stories"""
PAST_TENSES = """go went, see saw, eat ate, run ran, take took, give gave, write wrote, drive drove,
    sing sang, swim swam, buy bought, bring brought, think thought, sleep slept, fly flew, know knew,
    speak spoke"""
YOUNG = """a baby dog puppy, a baby cat kitten, a baby cow calf, a baby horse foal, a baby sheep lamb,
    a baby hen chick, a baby duck duckling, a baby bear cub, a baby goat kid, a baby kangaroo joey,
    a baby pig piglet, a baby deer fawn"""
SOUNDS = """a cow moo, a dog woof, a cat meow, a duck quack, a sheep baa, a pig oink, a horse neigh,
    a frog ribbit, an owl hoot, a bee buzz, a snake hiss, a lion roar"""
LEGS = "a spider eight, an ant six, a bee six, a horse four, a dog four, a cow four, a hen two, a swan two"

_AFTER = ("which is the {item}?", "what do we call the {item}?")
_CAPITAL = ("which city is the capital of {item}?", "what is the name of the capital of {item}?")
_OPPOSITE = ("which word means the opposite of {item}?", "what is a word for the opposite of {item}?")
_COLOUR = ("what colour is {item}?", "which colour does {item} have?")
_PLURAL = ("how do I write the plural of {item}?", "which word is the plural of {item}?")
_PAST = ("how do I write the past tense of {item}?", "which word is the past tense of {item}?")
_YOUNG = ("what is {item} called?", "what do people call {item}?")
_SOUND = ("what does {item} say?", "which sound does {item} make?")
_LEGS = ("how many legs does {item} have?", "how many legs can you count on {item}?")

FAMILIES = (
    Family("the {item}", _AFTER, "it is {answer}", _successors("day", DAYS) | _successors("month", MONTHS)),
    Family("the capital of {item}", _CAPITAL, "it is {answer}", _facts(CAPITALS)),
    Family("the opposite of {item}", _OPPOSITE, "it is {answer}", _facts(OPPOSITES)),
    Family("the colour of {item}", _COLOUR, "{item} is {answer}", _facts(COLOURS)),
    Family("the plural of {item}", _PLURAL, "we write {answer}", _facts(PLURALS)),
    Family("the past tense of {item}", _PAST, "we write {answer}", _facts(PAST_TENSES)),
    Family("the name of {item}", _YOUNG, "{item} is called a {answer}", _facts(YOUNG)),
    Family("the sound of {item}", _SOUND, "{item} says {answer}", _facts(SOUNDS)),
    Family("the number of legs of {item}", _LEGS, "{item} has {answer} legs", _facts(LEGS)),
)
