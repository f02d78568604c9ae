"""Decoding where a prompt's keys and values are kept once for all of its responses.

For models that go through transformers' `AttentionInterface`: those whose micro-batches run in the shared
way. Prompts are read packed, without padding; what has ended costs nothing but a place in the attention.

Legend: `B` prompts, `N` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_dpo.batching import BranchLayout
from lora_dpo.model import Model
from lora_dpo.sampling.attention import NAME, Kept

READ_TOKENS = 8192
"""So many tokens of prompts are read at a time, at most; one prompt at least."""

CROWDED = 0.75
"""Places are given up when so small a share of them is still in use."""


def can_share_prompts(model: Model) -> bool:
    """Whether attention of this model is a function of keys, window, softcap and sinks alone."""
    config = model.causal.config.get_text_config()
    by_place = any(
        getattr(config, name, None) for name in ("attention_chunk_size", "attn_temperature_tuning")
    )
    return model.way == "shared" and not by_place


class SharedPrompts:
    """An `Engine`. Inside `generating`, which gives the model its own attention back."""

    def __init__(self, model: Model):
        self._causal = model.causal

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        if self._causal.config._attn_implementation != NAME:
            self._causal.set_attn_implementation(NAME)
        self._kept = Kept([len(prompt) for prompt in prompts], self._causal.device)
        logits = torch.cat([self._read(part) for part in _parts(prompts)])
        self._kept.all_read()
        return logits

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        device, lengths = self._causal.device, [len(prompt) for prompt in prompts]
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        example = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths])
        layout = BranchLayout(example, torch.ones_like(example), positions, [(0, n) for n in lengths])
        last = torch.tensor(lengths).cumsum(0) - 1
        output = self._causal(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            branch_layout=layout.to(device),
            kept=self._kept,
            use_cache=False,
            logits_to_keep=last.to(device),
        )
        return output.logits[0]

    def repeat(self, copies: int) -> None:
        # Nothing of a prompt is copied, and no response has keys yet.
        self._kept.copies = copies

    def write(self, tokens: Tensor) -> Tensor:
        kept = self._kept
        places = torch.arange(kept.rows, device=tokens.device) if kept.places is None else kept.places
        positions = kept.lengths[places // kept.copies] + kept.written
        kept.next_token()
        output = self._causal(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            kept=kept,
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        kept = self._kept
        places = rows if kept.places is None else kept.places[rows]
        prompts, counts = torch.unique(places // kept.copies, return_counts=True)
        copies = int(counts.max())
        kept.places = places
        if len(prompts) * copies > CROWDED * kept.rows:
            return
        # Each prompt's rows go to its first places; what fills up the others is not looked at.
        of = torch.searchsorted(prompts, places // kept.copies)
        first = counts.cumsum(0) - counts
        fresh = of * copies + torch.arange(len(places), device=places.device) - first[of]
        sources = torch.zeros(len(prompts) * copies, dtype=torch.int64, device=places.device)
        sources[fresh] = places
        kept.keep(prompts, sources, copies)
        kept.places = None if len(fresh) == len(sources) else fresh


def _parts(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The prompts in order, so many at a time that their tokens are at most READ_TOKENS."""
    part: list[Sequence[int]] = []
    for prompt in prompts:
        if part and sum(map(len, part)) + len(prompt) > READ_TOKENS:
            yield part
            part = []
        part.append(prompt)
    yield part
