"""The judged responses of a prompt → a preference pair, or the reason why there is none.

Responses without text are left out, and of those that say the same (white space at the ends aside) one is
kept. The best that may be chosen is, the earliest of equally good ones. Which of those that are no better is
rejected says `Pairing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from lora_dpo.recipe import Pairing

TOO_FEW = "fewer than two different responses"
TOO_FEW_FOR_SECOND = "fewer than three different responses, so there is no second-worst"
UNFINISHED = "no response ended by itself"
CUT = "every response but the chosen one is a better one that did not end by itself"
CUT_FOR_SECOND = "a better response did not end by itself, so there is no second-worst"
LENGTHS = "no response of like length"
LENGTHS_FOR_SECOND = "fewer than two responses of like length, so there is no second-worst"
EQUAL = "all rewards are equal"
MARGIN = "the margin is too small"


@dataclass(frozen=True)
class Response:
    """A judged response: its place among those of the prompt, text, reward, length in tokens (in words, where
    nobody counted tokens), and whether it ended by itself.
    """

    place: int
    text: str
    reward: float
    tokens: int
    finished: bool = True


@dataclass(frozen=True)
class Pair:
    """chosen has the higher reward."""

    chosen: Response
    rejected: Response

    @property
    def margin(self) -> float:
        return self.chosen.reward - self.rejected.reward


def pair(responses: Sequence[Response], name: str, pairing: Pairing) -> Pair | str:
    """The pair of a prompt, or in words why it has none. name: the prompt's id, for the random choice.

    A function of the responses, whatever order they come in (their `place` breaks ties).
    """
    usable = different(responses)
    if len(usable) < 2:
        return TOO_FEW
    able = [r for r in usable if r.finished or pairing.keep_unfinished]
    if not able:
        return UNFINISHED
    chosen = max(able, key=lambda r: (r.reward, -r.place))
    below = [r for r in usable if r is not chosen and r.reward <= chosen.reward]
    if not below:
        return CUT
    near = [r for r in below if within(pairing.max_length_ratio, chosen, r)]
    if not near:
        return LENGTHS
    allowed = [r for r in near if _worse(chosen, r, pairing.min_margin)]
    if not allowed:
        return EQUAL if len({r.reward for r in usable}) == 1 else MARGIN
    if pairing.strategy == "best_second_worst":
        if len(near) < 2:
            return _no_second(usable, below)
        picked = sorted(near, key=_from_worst)[1]
        if picked not in allowed:
            return MARGIN
    elif pairing.strategy == "best_random":
        picked = min(allowed, key=lambda r: _draw(pairing.seed, name, r.text))
    else:
        picked = min(allowed, key=_from_worst)
    return Pair(chosen, _nearest_in_length(chosen, picked, allowed, pairing.length_slack))


def _no_second(usable: Sequence[Response], below: Sequence[Response]) -> str:
    """Why fewer than two responses could be the second-worst. below: those no better than the chosen one."""
    if len(usable) < 3:
        return TOO_FEW_FOR_SECOND
    return CUT_FOR_SECOND if len(below) < 2 else LENGTHS_FOR_SECOND


def different(responses: Sequence[Response]) -> list[Response]:
    """Those with text, each text once: of equal ones the first that ended by itself, else the first."""
    kept: dict[str, Response] = {}
    for response in sorted(responses, key=lambda r: (not r.finished, r.place)):
        text = response.text.strip()
        if text:
            kept.setdefault(text, response)
    return sorted(kept.values(), key=lambda r: r.place)


def length_ratio(a: Response, b: Response) -> float:
    """The longer one's tokens over the shorter one's."""
    shorter, longer = sorted((max(1, a.tokens), max(1, b.tokens)))
    return longer / shorter


def within(bound: float | None, a: Response, b: Response) -> bool:
    return bound is None or length_ratio(a, b) <= bound


def _worse(chosen: Response, other: Response, min_margin: float) -> bool:
    margin = chosen.reward - other.reward
    return margin > 0 and margin >= min_margin


def _from_worst(response: Response) -> tuple[float, int]:
    """Of equally bad ones the last is the worst, as of equally good ones the first is the best."""
    return response.reward, -response.place


def _draw(seed: int, name: str, text: str) -> str:
    return xxhash.xxh3_64_hexdigest(f"{seed}\0{name}\0{text.strip()}".encode("utf-8", "surrogatepass"))


def _nearest_in_length(
    chosen: Response, picked: Response, allowed: Sequence[Response], slack: float
) -> Response:
    """Of those whose reward is within the slack of what was picked, the nearest to the chosen one in length;
    then the nearest in reward.
    """
    if not slack:
        return picked
    alike = [r for r in allowed if abs(r.reward - picked.reward) <= slack]
    return min(
        alike,
        key=lambda r: (length_ratio(chosen, r), abs(r.reward - picked.reward), r is not picked, r.place),
    )
