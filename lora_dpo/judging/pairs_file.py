"""A judged file → a file of preference pairs, with rewards and where each comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.errors import DataError
from lora_dpo.judging.files import Sampled, read_samples
from lora_dpo.judging.pairing import Pair, Response, pair
from lora_dpo.recipe import Pairing
from lora_dpo.run_directory import write_text


class NoPairsError(DataError):
    """No prompt of a judged file gives a pair."""


@dataclass(frozen=True)
class Paired:
    """What became of the prompts: `pairs` of them a pair, the others by reason.

    Means over the pairs, NaN where there are none: the margin, and the lengths of both sides in tokens. A
    judge that is taken in by length shows here.
    """

    prompts: int
    pairs: int
    reasons: Counter[str] = field(default_factory=Counter)
    margin: float = float("nan")
    chosen_tokens: float = float("nan")
    rejected_tokens: float = float("nan")

    def lines(self) -> list[str]:
        """To print."""
        lines = [f"{self.pairs:,} pairs of {self.prompts:,} prompts"]
        lines += [f"{count:,} without a pair: {reason}" for reason, count in self.reasons.most_common()]
        if self.pairs:
            lines.append(
                f"margin {self.margin:.3f}, chosen {self.chosen_tokens:.1f} tokens, rejected"
                f" {self.rejected_tokens:.1f} tokens (means)"
            )
        return lines


def pair_file(judged: Path, output: Path, pairing: Pairing, *, round: int | None = None) -> Paired:
    """Write the pairs of a judged file, an ordinary preference file, by one rename; `output` is replaced.

    round: stands in every line, where one is given. Raises DataError, naming file and row, for what isn't
    judged, and NoPairsError where no prompt gives a pair.
    """
    if output.resolve() == judged.resolve():
        raise DataError(f"{output} is the judged file itself: name another one for the pairs")
    rows = read_samples(judged)
    found = [(row, pair(responses_of(row), row.candidates.id, pairing)) for row in rows]
    pairs = [(row, made) for row, made in found if isinstance(made, Pair)]
    reasons = Counter(made for _, made in found if isinstance(made, str))
    if not pairs:
        why = "; ".join(f"{count} prompts: {reason}" for reason, count in reasons.most_common())
        raise NoPairsError(f"{judged}: no prompt gives a pair ({why or 'there are none'})")
    write_text(output, "".join(_text(pair_line(row, made, round)) for row, made in pairs))
    return summary([made for _, made in pairs], reasons)


def summary(pairs: Sequence[Pair], reasons: Counter[str]) -> Paired:
    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    return Paired(
        prompts=len(pairs) + reasons.total(),
        pairs=len(pairs),
        reasons=reasons,
        margin=mean(made.margin for made in pairs),
        chosen_tokens=mean(made.chosen.tokens for made in pairs),
        rejected_tokens=mean(made.rejected.tokens for made in pairs),
    )


def responses_of(row: Sampled) -> list[Response]:
    """Raises DataError where one isn't judged."""
    texts, scores = row.candidates.responses, row.scores
    tokens = row.candidates.tokens or [len(text.split()) for text in texts]
    finished = row.candidates.finished or [True] * len(texts)
    return [
        Response(n, *values) for n, values in enumerate(zip(texts, scores, tokens, finished, strict=True))
    ]


def pair_line(row: Sampled, made: Pair, round: int | None = None) -> dict[str, Any]:
    """A line of the pairs file; what the row had for the template goes along."""
    line: dict[str, Any] = {
        "prompt": row.line["prompt"],
        "chosen": made.chosen.text,
        "rejected": made.rejected.text,
        "score_chosen": made.chosen.reward,
        "score_rejected": made.rejected.reward,
        "margin": made.margin,
        "id": row.candidates.id,
    }
    line |= {key: row.line[key] for key in ("sampler", "judge") if key in row.line}
    if row.candidates.tools:
        line["tools"] = list(row.candidates.tools)
    if row.candidates.template_kwargs:
        line["chat_template_kwargs"] = dict(row.candidates.template_kwargs)
    return line | ({} if round is None else {"round": round})


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
