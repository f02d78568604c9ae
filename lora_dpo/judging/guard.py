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

KINDS = ("exploited", "length", "repetition", "unfinished", "by_length")
"""What is warned of, in the order in which it is said."""

NOISE = 1.96
"""Standard errors of a difference; what lies within so many may be chance (95%, two-sided normal)."""


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
    reward_se, reward_held_out_se, reward_length_spearman_se: standard errors of those means, over prompts, as
    the responses to one prompt are not independent. They need two prompts.
    """
    texts = [text for group in groups for text in group.responses]
    words = [text.split() for text in texts]
    figures = {
        "reward": _mean([score for own in scores for score in own]),
        "reward_se": standard_error(scores),
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
    figures["reward_length_pearson"] = _mean(within_prompts(scores, lengths))
    spearman = within_prompts(list(map(ranks, scores)), list(map(ranks, lengths)))
    figures["reward_length_spearman"] = _mean(spearman)
    figures["reward_length_spearman_se"] = standard_error([[value] for value in spearman])
    if held_out_scores is not None:
        figures["reward_held_out"] = _mean([score for own in held_out_scores for score in own])
        figures["reward_held_out_se"] = standard_error(held_out_scores)
        figures["held_out_pearson"] = _mean(within_prompts(scores, held_out_scores))
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def compare(
    previous: Mapping[str, float], now: Mapping[str, float], first: Mapping[str, float] | None = None
) -> list[str]:
    """In words what speaks for a fooled judge, of reports; empty where nothing does.

    previous: of the round before. first: of round 0, which shows what grows a little every round; a finding
    is said once, by the round before if that shows it. Rewards, and their correlation with length, are said
    to have changed where the difference is beyond its noise (`changed`), so never without standard errors.
    """
    found = _findings(previous, now, "")
    if first is not None:
        found = _findings(first, now, " since round 0") | found
    return [found[kind] for kind in KINDS if kind in found]


def changed(name: str, before: Mapping[str, float], now: Mapping[str, float]) -> int:
    """1 where a mean rose, −1 where it fell, 0 where that may be chance or is not known.

    The difference of means is compared with `NOISE` × √(se² + se²), as of independent prompts. Reports on the
    same prompts differ by less chance than that, so what is said holds there all the more.
    """
    error = f"{name}_se"
    if not all(key in report for key in (name, error) for report in (before, now)):
        return 0
    difference = now[name] - before[name]
    if abs(difference) <= NOISE * math.hypot(before[error], now[error]):
        return 0
    return 1 if difference > 0 else -1


def _findings(before: Mapping[str, float], now: Mapping[str, float], since: str) -> dict[str, str]:
    """By kind. since: closes what is said of a change."""

    def both(name: str) -> tuple[float, float] | None:
        return (before[name], now[name]) if name in before and name in now else None

    found = {}
    if changed("reward", before, now) > 0 > changed("reward_held_out", before, now):
        found["exploited"] = (
            f"reward rose {before['reward']:.3f} → {now['reward']:.3f} while the held-out judge's fell"
            f" {before['reward_held_out']:.3f} → {now['reward_held_out']:.3f}{since}: the judge is being"
            " exploited, not satisfied; stop here, or train the reward model on the new responses"
        )
    unit = "tokens" if both("tokens") else "words"
    length = both(unit)
    if length is not None and length[1] > GROWTH * max(length[0], 1.0):
        found["length"] = (
            f"responses grew {length[0]:.0f} → {length[1]:.0f} {unit}{since}: pair within a length"
            " (pairing.max_length_ratio, pairing.length_slack), or take a judge that length does not move"
        )
    for name, what in (("repetition", "repeated 4-grams"), ("unfinished", "unfinished responses")):
        share = both(name)
        if share is not None and share[1] - share[0] > MORE:
            found[name] = f"{what} rose {share[0]:.0%} → {share[1]:.0%} of responses{since}: look at samples"
    name = "reward_length_spearman"
    if changed(name, before, now) > 0 and now[name] > BY_LENGTH:
        found["by_length"] = (
            f"within a prompt, reward follows length more than before{since} (Spearman {before[name]:.2f} →"
            f" {now[name]:.2f})"
        )
    return found


def repetition(words: Sequence[str], gram: int = GRAM) -> float:
    """The share of a text's n-grams that stood in it before; 0 for a text of fewer words."""
    grams = [tuple(words[n : n + gram]) for n in range(len(words) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(texts: Sequence[Sequence[str]], gram: int) -> float:
    """distinct-n: different n-grams over all n-grams of the texts (Li et al. 2016, arXiv:1510.03055)."""
    grams = [tuple(words[n : n + gram]) for words in texts for n in range(len(words) - gram + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def standard_error(groups: Sequence[Sequence[float]]) -> float:
    """Of the mean of all numbers; groups, the prompts, are independent. NaN of a single one.

    √(G/(G−1) · Σ_g (Σ_i (x_gi − mean))²) / N, the robust variance of Liang & Zeger 1986; of groups of one
    size, the standard deviation of their means over √G.
    """
    if len(groups) < 2:
        return math.nan
    mean = _mean([value for own in groups for value in own])
    sums = np.array([sum(value - mean for value in own) for own in groups])
    count = sum(len(own) for own in groups)
    return math.sqrt(len(groups) / (len(groups) - 1) * float(sums @ sums)) / count


def within_prompts(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    """Pearson's correlation of two numbers of each response, within each prompt where both vary."""
    found = [pearson(np.asarray(x, float), np.asarray(y, float)) for x, y in zip(a, b, strict=True)]
    return [value for value in found if not math.isnan(value)]


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
