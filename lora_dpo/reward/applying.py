"""A finished reward model on the one base: the rewards of responses.

Legend: `k` sides of an example, the responses to one prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.batching import MicroBatch, Way, cost
from lora_dpo.errors import DataError
from lora_dpo.evaluation import each_microbatch
from lora_dpo.logprobs import sequence_rewards
from lora_dpo.model import (
    REWARD,
    Model,
    as_reward,
    find_adapter,
    put_reward,
    read_record,
    record_notes,
)
from lora_dpo.preferences import Demonstration, Message, Where
from lora_dpo.reference import fingerprint_in_memory
from lora_dpo.tokenization import Branches, ChatTokenizer, Dropped, share

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A reward model's adapter and score head beside whatever else is on the base.

    model: with them on; its other roles are as they were. chat: makes tokens of conversations; its limits are
    the reward model's. fingerprint: of adapter and head, 32 hexadecimal digits.
    """

    model: Model
    chat: ChatTokenizer
    fingerprint: str

    @classmethod
    def put_on(
        cls,
        model: Model,
        folder: str | Path,
        chat: ChatTokenizer,
        *,
        key: str = "the reward model",
        say: Callable[[str], None] = log.warning,
    ) -> RewardModel:
        """Add the reward model of a folder (a run's, or an adapter's in PEFT's layout) to a base in memory.

        key: what named it, for errors. `say` is told where it was trained with another template, or on the
        base quantized otherwise. Raises ModelError where it is none, is of another base, or one is there.
        """
        place = find_adapter(str(folder), key)
        with_it = put_reward(model, str(folder), key)
        if model.base is not None:
            record = read_record(place)
            for line in record_notes(record, model.base, chat.chat_template, f"the adapter in {place}"):
                say(line)
        return cls(with_it, chat, fingerprint_in_memory(with_it, REWARD))

    def rewards(
        self,
        branches: Sequence[Branches],
        *,
        tokens_per_microbatch: int = 8192,
        progress: Callable[[int], None] | None = None,
        say: Callable[[str], None] = log.warning,
    ) -> list[list[float]]:
        """The reward of every side of these examples, which may have different numbers of sides.

        A prompt that is longer with all its responses than a micro-batch has some of them at a time.
        `progress` is told how many conversations each micro-batch had. When memory runs out smaller ones go
        on, and `say` is told. Raises RunError, naming the row, where a single conversation does not fit.
        """
        found = [[0.0] * item.sides for item in branches]
        groups: dict[int, list[tuple[int, range]]] = {}
        for n, item in enumerate(branches):
            for sides in _parts(item, tokens_per_microbatch, self.model.way):
                groups.setdefault(len(sides), []).append((n, sides))
        for count, parts in sorted(groups.items(), reverse=True):

            def add(batch: MicroBatch, numbers: list[int], parts: list[tuple[int, range]] = parts) -> None:
                with as_reward(self.model):
                    rows = sequence_rewards(self.model, batch).tolist()
                for number, row in zip(numbers, rows, strict=True):
                    n, sides = parts[number]
                    found[n][sides.start : sides.stop] = row

            def counted(examples: int, count: int = count) -> None:
                if progress is not None:
                    progress(examples * count)

            these = [branches[n].only(sides) for n, sides in parts]
            each_microbatch(
                self.model,
                these,
                add,
                tokens_per_microbatch=tokens_per_microbatch,
                progress=counted,
                say=say,
            )
        return found

    def branches(
        self,
        prompt: Sequence[Message] | str,
        responses: Sequence[str],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        where: Where | None = None,
    ) -> Branches:
        """A prompt with each of its responses as an example to reward, the prompt's tokens once.

        prompt: messages, or text that is already rendered. Each conversation is cut to the limits as if it
        stood alone, so that a reward does not depend on the other responses. Raises DataError where the
        template refuses one, or nothing of a response is left.
        """
        where = where or Where("a prompt", 1)
        kwargs, ids = dict(template_kwargs or {}), []
        for response in responses:
            turns = response if isinstance(prompt, str) else ({"role": "assistant", "content": response},)
            begin = prompt if isinstance(prompt, str) else tuple(prompt)
            record = Demonstration(begin, turns, where, tuple(tools) if tools else None, kwargs)
            try:
                ids.append(self.chat.branches(record).side(0))
            except Dropped as error:
                raise DataError(f"{error}: raise data.max_tokens") from error
        return share(ids, [np.zeros(len(side), dtype=np.bool_) for side in ids], where)


def _parts(item: Branches, budget: int, way: Way) -> list[range]:
    """Its sides in as few parts as fit the budget of tokens, at least one side each."""
    parts, start = [], 0
    for stop in range(1, item.sides + 1):
        if stop - start > 1 and cost([item.only(range(start, stop))], way) > budget:
            parts.append(range(start, stop - 1))
            start = stop - 1
    return [*parts, range(start, item.sides)]
