"""Attention while decoding: the keys of a prompt are kept once, however many responses read them.

Legend: `B` prompts, `K` places for a response to each, `N` rows (the places in use), `H` query heads, `G`
key-value heads (H is a multiple of G), `g` = H / G, `P` the longest prompt, `R` room for a response's tokens,
`d` head width.

What is kept travels as the keyword argument `kept` of the model's forward call, as a layout does for
`lora_dpo.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from lora_dpo.attention import branch_attention
from lora_dpo.batching import BranchLayout

NAME = "lora_dpo_decoding"
FIRST_ROOM = 32


@dataclass
class Layer:
    """One layer's keys and values. read: those of prompts read so far, by prompt, [G, tokens, d].

    prompt_keys, prompt_values: [B, G, P, d], padded on the right. keys, values: [B·K, G, R, d].
    """

    read: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    prompt_keys: Tensor = field(init=False)
    prompt_values: Tensor = field(init=False)
    keys: Tensor | None = None
    values: Tensor | None = None


class Kept:
    """What a wave of prompts leaves: their keys and values, and those of the responses so far.

    lengths: tokens of each prompt. written: tokens of each response so far. places: where in [B·K] each row
    is, int64 [N]; None where row n is at place n and none is empty.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths = torch.tensor(lengths, device=device)
        self.even = len(set(lengths)) == 1
        self.copies = 1
        self.written = 0
        self.places: Tensor | None = None
        self._layers: dict[torch.nn.Module, Layer] = {}
        self._hidden: dict[int | None, Tensor | None] = {}

    @property
    def rows(self) -> int:
        return len(self.lengths) * self.copies

    def read(self, module: torch.nn.Module, key: Tensor, value: Tensor, layout: BranchLayout) -> None:
        """Keep the keys and values [1, G, T, d] of some more prompts, packed."""
        sizes = [sum(lengths) for lengths in layout.lengths]
        # In half precision products of queries and keys would be rounded; a card has a product that isn't.
        parts = (_wide(x[0]).split(sizes, dim=1) for x in (key, value))
        self._layers.setdefault(module, Layer()).read += zip(*parts, strict=True)

    def all_read(self) -> None:
        for layer in self._layers.values():
            keys, values = zip(*layer.read, strict=True)
            layer.prompt_keys, layer.prompt_values = _stacked(keys), _stacked(values)
            layer.read.clear()

    def next_token(self) -> None:
        """One token more is about to be written."""
        self.written += 1
        self._hidden.clear()

    def keep(self, prompts: Tensor, places: Tensor, copies: int) -> None:
        """Take only these prompts [B'], and of the places those [B'·copies], in this order."""
        self.lengths, self.copies = self.lengths[prompts], copies
        everyone = len(prompts) == len(next(iter(self._layers.values())).prompt_keys)
        for layer in self._layers.values():
            if not everyone:
                layer.prompt_keys, layer.prompt_values = (
                    layer.prompt_keys[prompts],
                    layer.prompt_values[prompts],
                )
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[places], layer.values[places]

    def write(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Layer, Tensor, Tensor]:
        """Keep a token's keys and values [N, G, 1, d]; gives all of the responses' [B·K, G, written, d]."""
        layer = self._layers[module]
        keys = layer.keys = self._room(layer.keys, key)
        values = layer.values = self._room(layer.values, value)
        for room, new in ((keys, key), (values, value)):
            if self.places is None:
                room[:, :, self.written - 1] = new[:, :, 0]
            else:
                room[self.places, :, self.written - 1] = new[:, :, 0].to(room.dtype)
        return layer, keys[:, :, : self.written], values[:, :, : self.written]

    def _room(self, room: Tensor | None, new: Tensor) -> Tensor:
        if room is not None and self.written <= room.shape[2]:
            return room
        more = FIRST_ROOM if room is None else room.shape[2]
        shape = (self.rows, new.shape[1], more, new.shape[3])
        # Places of rows that ended are attended from, too, though nobody looks: no garbage there.
        fresh = torch.zeros(shape, dtype=_wide(new[:0]).dtype, device=new.device)
        return fresh if room is None else torch.cat([room, fresh], dim=2)

    def hidden(self, window: int | None) -> Tensor | None:
        """bool [B, 1, 1, P]: what of the prompts is padding, or too far behind; None if nothing is."""
        if window not in self._hidden:
            longest = next(iter(self._layers.values())).prompt_keys.shape[2]
            place = torch.arange(longest, device=self.lengths.device)
            hidden = None if self.even else place >= self.lengths[:, None]
            if window is not None and longest + self.written > window:
                # The token is at lengths + written − 1, and sees itself and window − 1 before.
                far = place < self.lengths[:, None] + self.written - window
                hidden = far if hidden is None else hidden | far
            self._hidden[window] = None if hidden is None else hidden[:, None, None]
        return self._hidden[window]


def decoding_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kept: Kept | None = None,
    branch_layout: BranchLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Of prompts (with a layout, as `branch_attention`), or of one new token a row.

    query [N, H, 1, d]; key, value [N, G, 1, d]; returns [N, 1, H, d]. The other arguments are those of
    `branch_attention`. Raises ValueError without what is kept.
    """
    if kept is None:
        raise ValueError(f"{NAME} keeps keys and values: pass kept, or set another attention")
    if branch_layout is not None:
        kept.read(module, key, value, branch_layout)
        special = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return branch_attention(
            module, query, key, value, None, scaling, branch_layout=branch_layout, **special
        )
    with torch.autocast(query.device.type, enabled=False):
        layer, keys, values = kept.write(module, key, value)
        groups, scale = key.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
        asked = _at_places((_wide(query[:, :, 0]) * scale).unflatten(1, (groups, -1)), kept)
        if sliding_window is not None:
            keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
        parts = [
            _of_prompts(asked, layer, kept, kept.hidden(sliding_window), softcap),
            _part(asked, keys, values, None, softcap),
        ]
        found = _merged(parts, None if s_aux is None else s_aux.float().view(1, groups, -1, 1))
    found = found.flatten(1, 2) if kept.places is None else found.flatten(1, 2)[kept.places]
    return found[:, None].to(query.dtype), None


def _at_places(rows: Tensor, kept: Kept) -> Tensor:
    """[N, …] → [B·K, …], zeros where there is no row."""
    if kept.places is None:
        return rows
    return rows.new_zeros(kept.rows, *rows.shape[1:]).index_copy_(0, kept.places, rows)


Part = tuple[Tensor, Tensor, Tensor]
"""Attention to some of the keys: the largest logit [B·K, G, g, 1], the sum of exp(logit − largest), and the
values [B·K, G, g, d] weighted by the same."""


def _of_prompts(
    asked: Tensor, layer: Layer, kept: Kept, hidden: Tensor | None, softcap: float | None
) -> Part:
    """All responses to a prompt ask its keys at once: asked [B·K, G, g, d] as [B, G, K·g, d]."""
    places, groups, heads, _ = asked.shape
    prompts, copies = len(kept.lengths), kept.copies

    def by_place(x: Tensor) -> Tensor:
        x = x.view(prompts, groups, copies, heads, -1).transpose(1, 2)
        return x.reshape(places, groups, heads, -1)

    by_prompt = asked.view(prompts, copies, groups, heads, -1).transpose(1, 2).flatten(2, 3)
    largest, total, sums = _part(by_prompt, layer.prompt_keys, layer.prompt_values, hidden, softcap)
    return by_place(largest), by_place(total), by_place(sums)


def _part(asked: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, softcap: float | None) -> Part:
    """asked [n, G, q, d] of keys, values [n, G, t, d]; hidden [n, 1, 1, t]."""
    logits = _product(asked, keys.transpose(-1, -2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if hidden is not None:
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    largest = logits.amax(dim=-1, keepdim=True)
    weights = (logits - largest).exp_()
    return largest, weights.sum(dim=-1, keepdim=True), _product(weights.to(values.dtype), values)


def _merged(parts: Sequence[Part], sinks: Tensor | None) -> Tensor:
    """[B·K, G, g, d]: softmax over the keys of all parts, and learned sinks [1, G, g, 1] without a value."""
    largest = torch.stack([part[0] for part in parts]).amax(dim=0)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    shares = [(part[0] - largest).exp() for part in parts]
    total = sum(share * part[1] for share, part in zip(shares, parts, strict=True))
    if sinks is not None:
        total = total + (sinks - largest).exp()
    return sum(share * part[2] for share, part in zip(shares, parts, strict=True)) / total  # pyright: ignore


def _wide(x: Tensor) -> Tensor:
    """float32 on a CPU, where products round to their inputs' dtype; as it is on a card."""
    return x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[n, G, q, k] × [n, G, k, t], summed and given in float32 at least."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, a.shape[:2])
    return a @ b


def _stacked(prompts: Sequence[Tensor]) -> Tensor:
    """[G, tokens, d] each → [B, G, P, d], zeros behind."""
    by_token = [prompt.transpose(0, 1) for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(by_token, batch_first=True).transpose(1, 2).contiguous()


# No mask function goes with it: transformers makes no mask for a name that has none.
AttentionInterface.register(NAME, decoding_attention)
