"""A small copy of a model's config that keeps its structure, and a random float64 model made from it.

Depth is cut where no new kind of layer follows; heads, head widths and widths are divided by powers of two,
so that whatever was a product of others still is; windows and chunks shrink below the probe's lengths.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

WINDOW = 8
"""What windows, chunks and the like become: shorter than the probe's sequences."""
POSITIONS = 32
"""What learned positions and buffers of causal masks hold: the probe's longest sequence, no packed batch."""
VOCABULARY = 64
EXPERTS = 4
HEAD_WIDTH = 16
MOST_PARAMETERS = 40_000_000

HEADS = re.compile(r"(\w+_)?((n|num)_(\w+_)?(heads?|head_kv|groups)|ngroups)$")
HEAD_WIDTHS = re.compile(r"(\w*_)?(head_dim|headdim|d_head|head_size|rotary_dim|kv_channels)$")
WIDTHS = re.compile(
    r"(\w*hidden_size\w*|n_embd|d_model|embed_dim|n_inner|d_ff|\w*intermediate_size\w*|ffn_dim"
    r"|\w*_dim|\w*_rank|lru_width|mamba_d_ssm)$"
)
STATES = re.compile(r"(\w*state_size|\w*d_state)$")
LENGTHS = re.compile(r"(\w*window(_size)?|\w*chunk(_size)?|floor_scale|index_topk|\w*block_size)$")
MOST_POSITIONS = re.compile(r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length)$")
EXPERT_COUNTS = re.compile(r"(\w*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)$")
EXPERT_CHOICES = re.compile(
    r"(num_experts_per_tok|\w*top_?k\w*|num_experts_per_token|moe_k|n_group|topk_group|n_shared_experts)$"
)
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def without_noise(config: Any) -> None:
    """Zero every dropout rate and router jitter: the base stays in train mode, and must be one function."""
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            noisy = "drop" in name or "jitter" in name
            if noisy and isinstance(value, float) and value:
                setattr(part, name, 0.0)


def small_models(config: Any, **options: Any) -> Iterator[PreTrainedModel]:
    """Random float64 models of the config's structure, on the CPU, the smallest first, then milder ones.

    options: of `from_config`. Raises the last error where none can be built; an earlier one is passed over.
    """
    error: Exception | None = None
    built = False
    milder = (
        (HEAD_WIDTH, True, True),
        (HEAD_WIDTH, False, True),
        (None, True, True),
        (None, False, True),
        (None, False, False),
    )
    for head_width, few_heads, cut in milder:
        try:
            small = shrunk(config, head_width, few_heads)
            network = build_small(small, cut=cut, **options)
            built = True
        except Exception as caught:  # whatever an unknown architecture's own code raises
            error = caught
            continue
        yield network
    if error is not None and not built:
        raise error


def build_small(small: Any, *, cut: bool, **options: Any) -> PreTrainedModel:
    """A model of a shrunk config; cut: leave layers out."""
    if cut:
        cut_depth(small, **options)
    count = sum(p.numel() for p in _skeleton(small, **options).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"its small copy has {count:,} parameters")
    network = _from_config(small, **options).double().requires_grad_(False).train()
    network.set_experts_implementation("eager")  # the grouped kernels take no float64
    amplify(network)
    return network


def _from_config(config: Any, **options: Any) -> PreTrainedModel:
    # A copy, since building one writes into it.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **options)


def shrunk(config: Any, head_width: int | None, few_heads: bool = True) -> Any:
    """A copy of the config, and of the configs inside it, with everything small but the depth.

    head_width: what attention's heads are divided down to, if at all; few_heads: divide their number too.
    """
    small = copy.deepcopy(config)
    without_noise(small)
    for part in (small, *(value for value in vars(small).values() if isinstance(value, PreTrainedConfig))):
        _shrink_part(part, head_width, few_heads)
    return small


def _shrink_part(part: Any, head_width: int | None, few_heads: bool) -> None:
    fields = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    heads = _divisor_of_heads(fields) if few_heads else 1
    by = _divisor_of_head_widths(fields, head_width) if head_width else 1
    # Some scaled rotary embeddings take the ratio of two lengths; those have no such buffers.
    keep_positions = "original_max_position" in repr(fields)
    for name, value in fields.items():
        small = _small_value(name, value, heads, by)
        if MOST_POSITIONS.match(name) and not keep_positions and _is_count(value):
            small = min(value, POSITIONS)
        if small != value:
            setattr(part, name, small)
    for overrides in per_layer(part).values():
        overrides.update({n: _small_value(n, value, heads, by) for n, value in overrides.items()})
    if fields.get("pad_token_id") is not None:
        part.pad_token_id = 0


def per_layer(config: Any) -> dict[int, dict[str, Any]]:
    """What single layers have of their own, by their numbers, as newer transformers configs keep it."""
    return getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_overrides", None) or {}


def _small_value(name: str, value: Any, heads: int, by: int) -> Any:
    if isinstance(value, list):
        return [_small_value(name, one, heads, by) for one in value]
    return _small_count(name, value, heads, by) if _is_count(value) else value


def _small_count(name: str, value: int, heads: int, by: int) -> int:
    if name.startswith("vocab_size"):
        return min(value, VOCABULARY)
    if LENGTHS.match(name):
        return min(value, WINDOW)
    if EXPERT_COUNTS.match(name):
        return min(value, EXPERTS)
    if EXPERT_CHOICES.match(name):
        return 1 if name.endswith("group") else min(value, 2)
    if STATES.match(name):
        return min(value, HEAD_WIDTH)
    if HEADS.match(name):
        return value // heads if value > 1 else value
    if HEAD_WIDTHS.match(name):
        return _divided(value, by)
    if WIDTHS.match(name):
        return _divided(value, heads * by)
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _divided(value: int, by: int) -> int:
    """Exact where it divides; else rounded up to an even number, which belongs to no product then."""
    return value // by if value % by == 0 else max(2, 2 * math.ceil(value / by / 2))


def _divisor_of_heads(fields: dict[str, Any]) -> int:
    """The largest power of two that leaves every count of heads whole, and at least two where it was."""
    counts = [v for name, v in fields.items() if _is_count(v) and v > 1 and HEADS.match(name)]
    divisor = 1
    while counts and all(c % (2 * divisor) == 0 and c // (2 * divisor) >= 2 for c in counts):
        divisor *= 2
    return divisor


def _divisor_of_head_widths(fields: dict[str, Any], head_width: int) -> int:
    """The power of two that brings attention's heads down to `head_width` and divides every other width."""
    widths = [v for name, v in fields.items() if _is_count(v) and HEAD_WIDTHS.match(name)]
    heads = [fields[n] for n in ("num_attention_heads", "n_head", "n_heads", "num_heads") if n in fields]
    sizes = [fields[n] for n in ("hidden_size", "n_embd", "d_model") if _is_count(fields.get(n))]
    if sizes and not _is_count(fields.get("head_dim")):
        widths.append(sizes[0] // (heads[0] if heads and _is_count(heads[0]) else 8))
    divisor = 1
    while widths and 2 * divisor * head_width <= max(widths) and all(w % (2 * divisor) == 0 for w in widths):
        divisor *= 2
    return divisor


def cut_depth(config: Any, **options: Any) -> None:
    """Leave out the layers after the last one that is the first of its kind (in place); keep two at least.

    The kinds are looked up in the model itself, built without memory; where cutting changes which there are
    (some configs count layers from the end), all layers are kept.
    """
    text = config.get_text_config()
    name = next((n for n in DEPTHS if _is_count(vars(text).get(n))), None)
    if name is None:
        return
    depth = getattr(text, name)
    stacks, lists = _layered(config, depth, **options)
    kinds = _kinds(config, stacks, lists, **options)
    if len(kinds) != depth:
        return
    keep = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    if keep >= depth:
        return
    trial = copy.deepcopy(config)
    _keep_layers(trial.get_text_config(), name, keep)
    try:
        same = set(_kinds(trial, stacks, lists, **options)) == set(kinds)
    except Exception:  # a config's own checks of how its numbers fit together
        return
    if same:
        _keep_layers(text, name, keep)


def _keep_layers(text: Any, name: str, keep: int) -> None:
    depth = getattr(text, name)
    for field, value in list(vars(text).items()):
        if _numbers_layers(field, value):
            setattr(text, field, [v for v in value if v < keep])
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, field, value[:keep])
    overrides = per_layer(text)
    for number in [n for n in overrides if n >= keep]:
        del overrides[number]
    setattr(text, name, keep)


def _numbers_layers(field: str, value: Any) -> bool:
    """A list such as attn_layer_indices, in rising order."""
    if not isinstance(value, (list, tuple)) or not value or not all(_is_count(v) or v == 0 for v in value):
        return False
    return ("layer" in field or "idx" in field) and list(value) == sorted(set(value))


def _skeleton(config: Any, **options: Any) -> PreTrainedModel:
    """The model without memory."""
    with torch.device("meta"):
        return _from_config(config, **options)


def _layered(config: Any, depth: int, **options: Any) -> tuple[list[str], list[str]]:
    """What there is once a layer: the paths of modules, and the config's fields."""
    modules = _skeleton(config, **options).named_modules()
    stacks = [path for path, m in modules if isinstance(m, nn.ModuleList) and len(m) == depth]
    fields = vars(config.get_text_config()).items()
    lists = [(name, value) for name, value in fields if isinstance(value, (list, tuple))]
    return stacks, [n for n, value in lists if len(value) == depth and not _numbers_layers(n, value)]


def _kinds(config: Any, stacks: list[str], lists: list[str], **options: Any) -> list[str]:
    """What each layer is made of: its modules' classes and plain settings, and what the config says of it."""
    if not stacks:
        return []
    network, text = _skeleton(config, **options), vars(config.get_text_config())
    layers: list[Any] = [network.get_submodule(path) for path in stacks]
    kinds = ["; ".join(map(_kind, parts)) for parts in zip(*layers, strict=True)]
    for field in lists:
        kinds = [f"{kind}; {field} {one}" for kind, one in zip(kinds, text[field], strict=True)]
    for field, value in text.items():
        if _numbers_layers(field, value):
            kinds = [f"{kind}; {field} {n in value}" for n, kind in enumerate(kinds)]
    return kinds


def _kind(layer: nn.Module) -> str:
    parts = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None)))
            and not re.search(r"layer_?(idx|id)", key)
        }
        parts.append(f"{name} {type(module).__name__} {sorted(plain.items(), key=str)}")
    return "; ".join(parts)


def amplify(network: nn.Module, *, gain: float = 1.5, seed: int = 0) -> None:
    """Random weights, in place, with which every layer matters: outputs of about `gain` times the inputs.

    The usual start (0.02) leaves attention so flat that a broken way is off by little.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.ndim >= 2:
                    scale = gain / math.sqrt(_inputs(module, parameter))
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(noise * scale)


def _inputs(module: nn.Module, parameter: nn.Parameter) -> float:
    """How many inputs a weight adds up."""
    if isinstance(module, nn.Embedding):
        return 1.0
    if isinstance(module, (nn.Linear, nn.Conv1d)):
        return math.prod(parameter.shape[1:])
    return math.sqrt(math.prod(parameter.shape[-2:]))
