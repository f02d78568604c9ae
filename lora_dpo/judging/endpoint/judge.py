"""Responses compared two by two, each pair in both orders, by a model behind an endpoint."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.judging.endpoint.asking import VERSION, Verdict, asked_again, question, verdict
from lora_dpo.judging.endpoint.client import FIRST_WAIT, Client
from lora_dpo.judging.endpoint.schedule import rewards, schedule
from lora_dpo.judging.endpoint.workers import run_all
from lora_dpo.judging.judges import Candidates, distinct, fingerprint
from lora_dpo.recipe import Judge

ASKED_AGAIN = 2
"""So often a question is put again whose answer is unusable."""

ENOUGH = 20
"""After so many comparisons the share of unusable ones is looked at; and at the end of each call."""


@dataclass(frozen=True)
class _Question:
    """One comparison in one order: response a shown as A, b as B, of prompt `group`."""

    group: int
    a: int
    b: int


@dataclass(frozen=True)
class _Unusable:
    """The last of the answers to a question, none of which was a verdict."""

    answer: str


@dataclass
class _Tally:
    """What the endpoint's answers were. swayed: pairs decided by the order, which count as ties."""

    pairs: int = 0
    ties: int = 0
    swayed: int = 0
    invalid: int = 0
    first: int = 0
    answers: int = 0
    unusable: list[str] = field(default_factory=list)
    again: int = 0


class EndpointJudge:
    """A reward is the share of a response's comparisons that it won: 1 all, 0 none; a tie counts half.

    Each pair is asked in both orders; where the answers agree one of them wins, else it is a tie. Equal texts
    are never compared with each other. `tally` counts what came.
    """

    name = "endpoint"

    def __init__(self, judge: Judge, *, first_wait: float = FIRST_WAIT):
        key = None
        if judge.api_key_env is not None:
            key = os.environ.get(judge.api_key_env)
            if not key:
                raise RecipeError(
                    f"judge.api_key_env: the environment variable {judge.api_key_env} is not set: set it"
                    " to the endpoint's key"
                )
        assert judge.model is not None
        self._judge, self.tally = judge, _Tally()
        self._client = Client(
            judge.what, judge.model, key, timeout=judge.timeout, retries=judge.retries, first_wait=first_wait
        )
        # As many prompts as keep all the calls busy; what is lost by a kill is these.
        self.at_once = max(1, judge.concurrency // 4)
        facts = (self._client.url, judge.model, judge.instruction, judge.opponents, VERSION)
        self.fingerprint = fingerprint("endpoint", *facts)

    def calls(self, group: Sequence[Candidates]) -> int:
        """How many questions these prompts take, without those that are put again."""
        texts = [distinct(candidates.responses)[0] for candidates in group]
        pairs = (
            schedule(own, candidates.id, self._judge.opponents)
            for own, candidates in zip(texts, group, strict=True)
        )
        return 2 * sum(map(len, pairs))

    def __call__(
        self, group: Sequence[Candidates], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raises RunError when calls keep failing, or too many answers are unusable."""
        found = [distinct(candidates.responses) for candidates in group]
        questions, left = self._questions(group, [texts for texts, _ in found])

        def ask(asked: _Question, stop: threading.Event) -> Verdict | _Unusable:
            texts = found[asked.group][0]
            return self._ask(group[asked.group], texts[asked.a], texts[asked.b], stop)

        def done(n: int) -> None:
            number = questions[n].group
            left[number] -= 1
            if progress is not None and not left[number]:
                progress(1)

        if progress is not None and (empty := sum(not left[n] for n in range(len(group)))):
            progress(empty)
        answers = run_all(questions, ask, threads=self._judge.concurrency, done=done)
        outcomes = self._outcomes(dict(zip(questions, answers, strict=True)), len(group))
        self._check_invalid()
        made = []
        for (texts, places), own in zip(found, outcomes, strict=True):
            each = rewards(len(texts), own)
            made.append([each[place] for place in places])
        return made

    def notes(self) -> list[str]:
        """What the answers were, and whether the order decided them."""
        tally = self.tally
        if not tally.pairs:
            return []
        lines = [
            f"{tally.pairs:,} comparisons in both orders, {self._client.calls:,} calls, of which"
            f" {self._client.failures:,} failed",
            f"{tally.ties / tally.pairs:.0%} ties, {tally.swayed / tally.pairs:.0%} decided by the order"
            " alone (they count as ties)",
        ]
        if tally.answers:
            lines.append(
                f"the response shown first was preferred in {tally.first / tally.answers:.0%} of the verdicts"
            )
        if tally.invalid:
            lines.append(
                f"{tally.invalid:,} comparisons had no usable answer and count for nobody, such as"
                f" '{tally.unusable[0]}'"
            )
        return lines

    def _questions(
        self, group: Sequence[Candidates], texts: Sequence[Sequence[str]]
    ) -> tuple[list[_Question], Counter[int]]:
        """Every pair in both orders, and how many there are of each prompt."""
        questions = [
            _Question(n, *order)
            for n, candidates in enumerate(group)
            for i, j in schedule(texts[n], candidates.id, self._judge.opponents)
            for order in ((i, j), (j, i))
        ]
        return questions, Counter(asked.group for asked in questions)

    def _ask(self, candidates: Candidates, a: str, b: str, stop: threading.Event) -> Verdict | _Unusable:
        """The verdict; the question is put again where the answer is none."""
        messages = question(candidates, a, b, self._judge.instruction)
        answer, asked = "", messages
        for _ in range(1 + ASKED_AGAIN):
            answer = self._client.complete(asked, stop)
            found = verdict(answer)
            if found is not None:
                return found
            asked = asked_again(messages, answer)
        return _Unusable(answer)

    def _outcomes(
        self, answers: Mapping[_Question, Verdict | _Unusable], groups: int
    ) -> list[dict[tuple[int, int], float | None]]:
        """Of each prompt and pair (i, j): 1, 0, ½, or None where an order has no usable answer."""
        outcomes: list[dict[tuple[int, int], float | None]] = [{} for _ in range(groups)]
        for asked, there in answers.items():
            if asked.a > asked.b:
                continue
            back = answers[_Question(asked.group, asked.b, asked.a)]
            outcomes[asked.group][asked.a, asked.b] = self._outcome(there, back)
        return outcomes

    def _outcome(self, there: Verdict | _Unusable, back: Verdict | _Unusable) -> float | None:
        """there: the verdict with i shown as A; back: with j shown as A."""
        tally = self.tally
        tally.pairs += 1
        wrong = [answer for answer in (there, back) if isinstance(answer, _Unusable)]
        if wrong:
            tally.invalid += 1
            tally.unusable.append(self._client.shown(wrong[0].answer, 80))
            del tally.unusable[3:]
            return None
        tally.answers += sum(answer != "tie" for answer in (there, back))
        tally.first += (there == "A") + (back == "A")
        if there == "A" and back == "B":
            return 1.0
        if there == "B" and back == "A":
            return 0.0
        tally.ties += 1
        tally.swayed += there == back != "tie"
        return 0.5

    def _check_invalid(self) -> None:
        tally, most = self.tally, self._judge.max_invalid
        if tally.invalid and (tally.pairs >= ENOUGH or tally.invalid == tally.pairs):
            share = tally.invalid / tally.pairs
            if share > most:
                raise RunError(
                    f"judge: {share:.0%} of {self._client.url}'s comparisons have no usable answer, such as"
                    f" '{tally.unusable[0]}': it takes a model that answers in JSON, or judge.max_invalid"
                    f" above {most:g}"
                )
