"""Which responses of a prompt are compared with which, and the rewards that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xxhash

ALL_UP_TO, OPPONENTS = 5, 4
"""So many responses are all compared with each other; of more, each with so many others."""


def schedule(responses: Sequence[str], name: str, opponents: int | None) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of numbers of responses: all, or a ring in which each meets `opponents` others
    (one more where both that and the number of responses are odd).

    The ring's order is that of a hash of prompt and response, so that neighbours are not those that were
    sampled one after the other, and the same whatever order they come in.
    """
    count = len(responses)
    if opponents is None:
        opponents = count - 1 if count <= ALL_UP_TO else OPPONENTS
    ring = sorted(range(count), key=lambda n: (_hash(name, responses[n]), n))
    opponents = min(opponents, count - 1)
    steps = list(range(1, opponents // 2 + 1 + (opponents % 2) * (count % 2)))
    if opponents % 2 and count % 2 == 0:
        steps.append(count // 2)  # the one opposite in the ring
    pairs = {_ordered(ring[n], ring[(n + step) % count]) for step in steps for n in range(count)}
    return sorted(pairs)


def rewards(count: int, outcomes: Mapping[tuple[int, int], float | None]) -> list[float]:
    """Of each of `count` responses the share of its comparisons that it won, a tie counting half.

    outcomes: of each pair (i, j) 1 where i won, 0 where j did, ½ for a tie; None where no usable answer came,
    which counts for neither. A response without any usable comparison gets ½.
    """
    won, met = [0.0] * count, [0] * count
    for (i, j), outcome in outcomes.items():
        if outcome is None:
            continue
        won[i] += outcome
        won[j] += 1 - outcome
        met[i] += 1
        met[j] += 1
    return [w / m if m else 0.5 for w, m in zip(won, met, strict=True)]


def _ordered(i: int, j: int) -> tuple[int, int]:
    return (i, j) if i < j else (j, i)


def _hash(name: str, response: str) -> str:
    return xxhash.xxh3_64_hexdigest(f"{name}\0{response}".encode("utf-8", "surrogatepass"))
