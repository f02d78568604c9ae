"""Attention over a packed, branching micro-batch, for every model that goes through `AttentionInterface`.

Legend: `T` packed tokens, `H` query heads, `G` key-value heads (H is a multiple of G), `d` head width.

The layout travels as the keyword argument `branch_layout` of the model's forward call, never as a global: a
checkpointed layer is recomputed while another micro-batch is current.

On CUDA, with bfloat16 or float16 on Ampere or newer, all branches run in one variable-length flash call:
torch's own, or flash-attn's where that is installed and torch's can't (softcapped logits). Elsewhere each
block is one scaled-dot-product call, or the formula itself where no kernel knows it. All expand a prefix's
keys and values only inside the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from lora_dpo.batching import Block, BranchLayout

NAME = "lora_dpo_branches"
"""The attention implementation's name, as `attn_implementation=` takes it."""


def branch_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    branch_layout: BranchLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed micro-batch.

    query [1, H, T, d]; key, value [1, G, T, d]; returns [1, T, H, d]. `sliding_window` counts the token
    itself; `softcap` is c in c·tanh(logits / c); `s_aux` [H] are learned sinks. `dropout` is ignored: policy
    and reference must see the same function. Raises ValueError without a layout, since no mask was made.
    """
    if branch_layout is None:
        raise ValueError(f"{NAME} attends to packed branches: pass branch_layout, or set another attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = _by_position(module, query, branch_layout)
    special = softcap is not None or s_aux is not None
    chunk = _chunk(module, query.shape[2])
    plain = chunk is None and s_aux is None
    if query.is_cuda and plain and flash_takes(query.dtype, key.shape[-1], value.shape[-1], query.device):
        attend = flash_call(softcap is not None)
        if attend is not None:
            return _flash(attend, query, key, value, branch_layout, scale, sliding_window, softcap), None
    window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
    blocks, outputs = branch_layout.blocks, []
    sizes = [block.stop - block.start for block in blocks]
    # Blocks follow one another: backward joins parts, where from slices it would add up whole tensors.
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    for n, block in enumerate(blocks):
        q, k, v = queries[n], _with_prefix(block, n, keys), _with_prefix(block, n, values)
        if special:
            mask = branch_layout.mask(block, window, chunk)
            outputs.append(_explicit(q, k, v, mask, scale, softcap, s_aux))
        elif block.causal and window is None and chunk is None:
            outputs.append(_sdpa(q, k, v, None, scale))
        else:
            outputs.append(_sdpa(q, k, v, branch_layout.mask(block, window, chunk), scale))
    # Joined so that the result is contiguous: some models view it.
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).contiguous(), None


def _chunk(module: torch.nn.Module, tokens: int) -> int | None:
    """The width of a layer's attention chunks, which transformers puts into its mask only (Llama 4)."""
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types is None or types[module.layer_idx] != "chunked_attention":  # pyright: ignore[reportArgumentType]
        return None
    return config.attention_chunk_size if config.attention_chunk_size < tokens else None


def _by_position(module: torch.nn.Module, query: Tensor, layout: BranchLayout) -> Tensor:
    """Queries whose scale grows with the position, where the model took the place in the batch for it.

    Llama 4 tunes the temperature of layers without rotary embeddings: ln(1 + ⌊(n + 1) / floor_scale⌋) ·
    attn_scale + 1 at place n.
    """
    tuned: Any = module
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    place = torch.arange(query.shape[2], device=query.device)
    if query.shape[2] < tuned.floor_scale:
        return query

    def scale(n: Tensor) -> Tensor:
        n = n.to(torch.promote_types(query.dtype, torch.float32))
        return torch.log1p(torch.floor((n + 1.0) / tuned.floor_scale)) * tuned.attn_scale + 1.0

    return query * (scale(layout.position) / scale(place)).to(query.dtype)[:, None]


def _with_prefix(block: Block, n: int, parts: Sequence[Tensor]) -> Tensor:
    """The keys or values of the n-th block, from those of every block by itself."""
    if not block.back:
        return parts[n]
    start, stop = block.key_spans[0]
    return torch.cat([parts[n - block.back][:, :, : stop - start], parts[n]], dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:
        # Before Ampere only the memory-efficient kernel is left, and it knows no groups.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The formula itself, for what fused kernels lack: softcapped logits and attention sinks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q @ k.transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if sinks is not None:
        sink = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1, dtype=wide).to(v.dtype)
    return weights[..., : k.shape[2]] @ v


@cache
def flash_takes(dtype: torch.dtype, key_width: int, value_width: int, device: torch.device) -> bool:
    """Whether flash attention takes these: half precision, equal widths, Ampere or newer."""
    half = dtype in (torch.bfloat16, torch.float16)
    if not half or key_width != value_width or key_width > 256 or key_width % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def flash_call(softcapped: bool) -> Callable[..., Tensor] | None:
    """The variable-length call to use: torch's own before that of flash-attn, which alone knows a softcap.

    It takes (q [T, H, d], k, v [keys, G, d], cu_q, cu_k, max_q, max_k, scale, window, softcap).
    """
    if not softcapped and (found := _torch_varlen()) is not None:
        return partial(_call_torch, *found)
    found = _flash_attn()
    return None if found is None else partial(_call_flash_attn, found)


@cache
def _torch_varlen() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """torch's variable-length attention and the names of its arguments, which change between releases."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    # Without `scale` and `window_size` (torch 2.10 and older) it can't say what some models need.
    return (varlen_attn, names) if {"scale", "window_size"} <= names else None


@cache
def _flash_attn() -> Callable[..., Any] | None:
    """flash-attn's variable-length attention (Dao 2023, arXiv:2307.08691), where it is installed and
    works.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:  # not there, or built for another torch
        return None
    names = inspect.signature(flash_attn_varlen_func).parameters
    # Before 2.1 causal was aligned at the top left, and there was no softcap: both mean another function.
    return flash_attn_varlen_func if {"window_size", "softcap"} <= set(names) else None


def _call_torch(
    attend: Callable[..., Any], names: frozenset[str], q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Tensor:
    cu_q, cu_k, max_q, max_k, scale, window, _ = rest
    options: dict[str, Any] = {"scale": scale, "window_size": (window, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def _call_flash_attn(attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    cu_q, cu_k, max_q, max_k, scale, window, softcap = rest
    options = {"softmax_scale": scale, "window_size": (window, 0), "softcap": softcap or 0.0}
    return attend(q, k, v, cu_q, cu_k, max_q, max_k, causal=True, **options)


def _flash(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BranchLayout,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """All branches in one call: queries in place, keys and values gathered behind their own prefixes."""
    index, *lengths = layout.varlen
    q = query[0].transpose(0, 1)
    k, v = (x[0].transpose(0, 1).index_select(0, index) for x in (key, value))
    # transformers counts the token itself; these calls count those to its left.
    window = -1 if sliding_window is None else sliding_window - 1
    return attend(q, k, v, *lengths, scale, window, softcap).unsqueeze(0)


# No mask function goes with it: the layout is the mask. For a name that has one, transformers looks for
# packing in the positions of each forward call, and the host waits for the device to tell.
AttentionInterface.register(NAME, branch_attention)
