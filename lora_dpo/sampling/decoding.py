"""Token by token: K responses to each of some prompts, whose keys and values are computed once.

Legend: `B` prompts, `K` responses to each, `N` rows that are still being written (B·K at first), `V`
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_dpo.sampling.choosing import NOT_A_NUMBER

Choose = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, V], numbers in [0, 1) [N]) → tokens [N]; see `Chooser`."""


@dataclass(frozen=True)
class Response:
    """ids: without the stop token. finished: it ended by a stop token, not where it had to be cut. stop: that
    token, where it is known.
    """

    ids: list[int]
    finished: bool
    stop: int | None = field(default=None, compare=False)


class Engine(Protocol):
    """A model with the keys and values of what it has read."""

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] of the first token of an answer to each prompt."""
        ...

    def repeat(self, copies: int) -> None:
        """From here on there are `copies` rows of each prompt, one after another."""
        ...

    def write(self, tokens: Tensor) -> Tensor:
        """One token more for each row, int64 [N]; the logits [N, V] of the next one."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, int64, rising."""
        ...


class NotANumberError(ArithmeticError):
    """The logits of a row were no numbers. prompt: which of the prompts it answers."""

    def __init__(self, prompt: int):
        super().__init__(prompt)
        self.prompt = prompt


def respond(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    copies: int,
    uniforms: NDArray[np.float64],
    choose: Choose,
    stop_ids: Sequence[int],
    lengths: Sequence[int],
) -> list[list[Response]]:
    """`copies` responses to each prompt.

    uniforms: [B·copies, tokens], the noise of each row and token. lengths: the most tokens of a response to
    each prompt. Raises NotANumberError.
    """
    logits = engine.read(prompts).repeat_interleave(copies, dim=0)
    if copies > 1:
        engine.repeat(copies)
    noise = torch.from_numpy(uniforms).to(logits.device)
    made: list[list[int]] = [[] for _ in range(len(uniforms))]
    ended: list[int | None] = [None] * len(made)
    rows, stops = list(range(len(made))), set(stop_ids)
    while True:
        tokens = choose(logits, noise[torch.tensor(rows), len(made[rows[0]])])
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token == NOT_A_NUMBER:
                raise NotANumberError(row // copies)
            if token in stops:
                ended[row] = token
                continue
            made[row].append(token)
            if len(made[row]) < lengths[row // copies]:
                going.append(place)
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=tokens.device)
            engine.keep(kept)
            tokens, rows = tokens[kept], [rows[place] for place in going]
        logits = engine.write(tokens)
    responses = [Response(ids, by is not None, by) for ids, by in zip(made, ended, strict=True)]
    return [responses[at : at + copies] for at in range(0, len(responses), copies)]
