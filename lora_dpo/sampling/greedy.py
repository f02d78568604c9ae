"""The most likely response to each prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from lora_dpo.model import Model, as_base, as_policy, as_reference, generating

Role = Literal["policy", "reference", "base"]
ROLES = {"policy": as_policy, "reference": as_reference, "base": as_base}


def greedy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    role: Role = "policy",
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most likely response to each prompt, token by token, as ids without the stop token.

    prompts: token ids, each ending where the response begins. role: who answers. Prompts of
    like length are batched together, padded on the left and masked; of the same length only, where the model
    has recurrent layers, say, and is not run under masks either.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    groups = [order]
    if model.way in ("padded", "single"):
        groups = [list(same) for _, same in itertools.groupby(order, key=lambda n: len(prompts[n]))]
    batches = [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
    with generating(model), ROLES[role](model):
        for rows in batches:
            made = _generate(model, [prompts[n] for n in rows], stop_ids, max_new_tokens)
            for n, ids in zip(rows, made, strict=True):
                responses[n] = ids
            if progress is not None:
                progress(len(rows))
    return responses


def _generate(
    model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    longest = max(map(len, prompts))
    pad = stop_ids[0] if stop_ids else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.causal.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    return [_until_stop(row, stop_ids) for row in output[:, longest:].tolist()]


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [n for n, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0]] if ends else ids
