"""How often a judge agrees with pairs that somebody labelled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_dpo.errors import DataError
from lora_dpo.evaluation import Interval, bootstrap
from lora_dpo.judging.judges import (
    Candidates,
    JudgeProtocol,
    at_once,
    check_rewards,
    fingerprint,
    notes_of,
    tag,
)
from lora_dpo.losses import preferred
from lora_dpo.preferences import Preference
from lora_dpo.run_directory import write_text
from lora_dpo.training import Display


@dataclass(frozen=True)
class Agreement:
    """accuracy: the share of pairs whose chosen response has the higher reward, a tie counting half; margin:
    reward of chosen − rejected; both with 95% bootstrap intervals. left_out: pairs with a response of several
    turns, or of tool calls alone.
    """

    pairs: int
    left_out: int
    ties: int
    accuracy: Interval
    margin: Interval


def judge_pairs(
    judge: JudgeProtocol,
    pairs: Sequence[Preference],
    *,
    output: Path | None = None,
    display: Display | None = None,
) -> Agreement:
    """Judge both responses of each pair. output: where pairs and their rewards are written, as JSON lines.

    Raises DataError where no pair can be judged, and what the judge raises.
    """
    display = display or Display(quiet=True)
    made = [(pair, candidates_of(pair)) for pair in pairs]
    found = [(pair, candidates) for pair, candidates in made if candidates is not None]
    if not found:
        raise DataError("there is no pair whose responses are single answers with text")
    rewards: list[list[float]] = []
    with display.counting("judging", len(found)) as advance:
        for start in range(0, len(found), at_once(judge)):
            group = [candidates for _, candidates in found[start : start + at_once(judge)]]
            own = judge(group, advance)
            check_rewards(judge, group, own)
            rewards += own
    for line in notes_of(judge):
        display.say(f"judge: {line}")
    chosen, rejected = torch.tensor(rewards, dtype=torch.float64).unbind(1)
    if output is not None:
        _write(output, judge, [candidates for _, candidates in found], rewards)
    return Agreement(
        pairs=len(found),
        left_out=len(pairs) - len(found),
        ties=int((chosen == rejected).sum()),
        accuracy=bootstrap(preferred(chosen, rejected)),
        margin=bootstrap(chosen - rejected),
    )


def candidates_of(pair: Preference) -> Candidates | None:
    """(chosen, rejected) of a pair; None where one is no single answer with text alone."""
    texts = [_single(side) for side in (pair.chosen, pair.rejected)]
    if texts[0] is None or texts[1] is None:
        return None
    name = fingerprint(pair.prompt, pair.tools, sorted(pair.template_kwargs.items()))
    return Candidates(name, pair.prompt, (texts[0], texts[1]), pair.tools, pair.template_kwargs)


def _single(side: object) -> str | None:
    if isinstance(side, str):
        return side
    assert isinstance(side, tuple)
    alone = len(side) == 1 and not side[0].get("tool_calls")
    return str(side[0]["content"]) if alone else None


def _write(
    output: Path, judge: JudgeProtocol, group: Sequence[Candidates], rewards: Sequence[Sequence[float]]
) -> None:
    lines = []
    for candidates, (chosen, rejected) in zip(group, rewards, strict=True):
        values = dataclasses.asdict(candidates)
        line = {
            "prompt": values["prompt"],
            "chosen": candidates.responses[0],
            "rejected": candidates.responses[1],
            "score_chosen": chosen,
            "score_rejected": rejected,
            "id": candidates.id,
            "judge": tag(judge),
        }
        line |= {"tools": values["tools"]} if candidates.tools else {}
        line |= {"chat_template_kwargs": values["template_kwargs"]} if candidates.template_kwargs else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(output, "".join(lines))
