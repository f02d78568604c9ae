"""Noise by counting: the number for token t of response k to a prompt is a function of (seed, prompt, k, t).

No generator is stepped, so neither the batch nor what was drawn before changes a number, and torch's own
random state is never touched.

Legend: `N` rows (a response each), `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)

Words = NDArray[np.uint64]
"""Numbers of 32 bits, kept in 64 so that a product has room."""


def prompt_key(ids: Sequence[int]) -> str:
    """16 hexadecimal digits: a hash of a prompt's token ids, its name for the noise and in files."""
    return xxhash.xxh3_64_hexdigest(np.asarray(ids, dtype="<i4").tobytes())


def uniforms(seed: int, keys: Sequence[str], responses: Sequence[int], tokens: int) -> NDArray[np.float64]:
    """float64 [N, T], each in [0, 1) with 53 random bits: row n belongs to response `responses[n]` to the
    prompt named `keys[n]`.
    """
    names = np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], dtype=np.uint64)[:, None]
    which = np.asarray(responses, dtype=np.uint64)[:, None]
    places = np.arange(tokens, dtype=np.uint64)[None]
    shape = np.broadcast_shapes(names.shape, places.shape)
    counter = [np.broadcast_to(word, shape) for word in (names & LOW, names >> HALF, which, places)]
    high, low, *_ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53


def philox(counter: Sequence[Words], key: tuple[int, int]) -> list[Words]:
    """Philox4x32-10: four random words for each counter of four words, under a key of two.

    Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        left, right = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b, c, d = (
            (right >> HALF) ^ b ^ np.uint64(first),
            right & LOW,
            (left >> HALF) ^ d ^ np.uint64(second),
            left & LOW,
        )
        first, second = (first + STEPS[0]) & 0xFFFFFFFF, (second + STEPS[1]) & 0xFFFFFFFF
    return [a, b, c, d]
