"""Whether the judge is being fooled: what a policy trained on its rewards may do instead of improving.

Beside the mean reward stand that of a judge whom training never sees, length, repetition, and how much of the
reward is length (Gao et al. 2023, arXiv:2210.10760; Singhal et al. 2023, arXiv:2310.03716).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_dpo.judging.judges import Candidates

GRAM = 4
GROWTH = 1.3
"""Responses that are this many times as long as before are warned of."""

MORE = 0.1
"""So much more repetition, or unfinished responses, as a share, is warned of."""

BY_LENGTH = 0.5
"""A correlation of reward and length within prompts that is warned of."""


def report(
    groups: Sequence[Candidates],
    scores: Sequence[Sequence[float]],
    held_out_scores: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """What to watch of a set of judged responses; a figure that they don't give is left out.

    reward, reward_held_out: means over all responses. words, tokens: mean length. repetition: share of a
    response's 4-grams of words that came before in it, meaned over responses; distinct_1, distinct_2:
    different words, and pairs of words, over all, in all responses together. unfinished: share cut at
    max_new_tokens.
    reward_length_pearson, reward_length_spearman: correlation of reward and length within a prompt, meaned
    over the prompts where both vary. held_out_pearson: the same of both judges.
    """
    texts = [text for group in groups for text in group.responses]
    words = [text.split() for text in texts]
    figures = {
        "reward": _mean([score for own in scores for score in own]),
        "words": _mean([len(own) for own in words]),
        "repetition": _mean([repetition(own) for own in words]),
        "distinct_1": distinct_share(words, 1),
        "distinct_2": distinct_share(words, 2),
    }
    if all(group.tokens for group in groups):
        figures["tokens"] = _mean([count for group in groups for count in group.tokens])
    if all(group.finished for group in groups):
        figures["unfinished"] = _mean([not ended for group in groups for ended in group.finished])
    lengths = [[float(n) for n in _lengths(group)] for group in groups]
    figures["reward_length_pearson"] = within_prompts(scores, lengths)
    figures["reward_length_spearman"] = within_prompts(list(map(ranks, scores)), list(map(ranks, lengths)))
    if held_out_scores is not None:
        figures["reward_held_out"] = _mean([score for own in held_out_scores for score in own])
        figures["held_out_pearson"] = within_prompts(scores, held_out_scores)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def compare(previous: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """In words what speaks for a fooled judge, of two reports; empty where nothing does."""

    def both(name: str) -> tuple[float, float] | None:
        return (previous[name], now[name]) if name in previous and name in now else None

    lines = []
    reward, held_out = both("reward"), both("reward_held_out")
    if reward and held_out and reward[1] > reward[0] and held_out[1] < held_out[0]:
        lines.append(
            f"reward rose {reward[0]:.3f} → {reward[1]:.3f} while the held-out judge's fell"
            f" {held_out[0]:.3f} → {held_out[1]:.3f}: the judge is being exploited, not satisfied; stop here,"
            " or train the reward model on the new responses"
        )
    for name, unit in (("tokens", "tokens"), ("words", "words")):
        length = both(name)
        if length is not None and length[1] > GROWTH * max(length[0], 1.0):
            lines.append(
                f"responses grew {length[0]:.0f} → {length[1]:.0f} {unit}: pair within a length"
                " (pairing.max_length_ratio, pairing.length_slack), or take a judge that length does not move"
            )
            break
    for name, what in (("repetition", "repeated 4-grams"), ("unfinished", "unfinished responses")):
        share = both(name)
        if share is not None and share[1] - share[0] > MORE:
            lines.append(f"{what} rose {share[0]:.0%} → {share[1]:.0%} of responses: look at samples")
    correlation = both("reward_length_spearman")
    if correlation is not None and correlation[1] > BY_LENGTH and correlation[1] > correlation[0]:
        lines.append(
            f"within a prompt, reward follows length more than before (Spearman {correlation[0]:.2f} →"
            f" {correlation[1]:.2f})"
        )
    return lines


def repetition(words: Sequence[str], gram: int = GRAM) -> float:
    """The share of a text's n-grams that stood in it before; 0 for a text of fewer words."""
    grams = [tuple(words[n : n + gram]) for n in range(len(words) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(texts: Sequence[Sequence[str]], gram: int) -> float:
    """distinct-n: different n-grams over all n-grams of the texts (Li et al. 2016, arXiv:1510.03055)."""
    grams = [tuple(words[n : n + gram]) for words in texts for n in range(len(words) - gram + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def within_prompts(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Pearson's correlation of two numbers of each response, within each prompt, meaned over prompts; NaN
    where in none of them both vary.
    """
    found = [pearson(np.asarray(x, float), np.asarray(y, float)) for x, y in zip(a, b, strict=True)]
    return _mean([value for value in found if not math.isnan(value)])


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """NaN where one of them does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny numbers would vanish
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the least; equal ones share the mean of their ranks."""
    array = np.asarray(values, float)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    equal = (array[None, :] == array[:, None]).sum(axis=1)
    return (below + (equal + 1) / 2).tolist()


def _lengths(group: Candidates) -> Sequence[int]:
    return group.tokens or [len(text.split()) for text in group.responses]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
