"""What a card says of the training: base, data, recipe, and the objective in words and as a formula."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import yaml

from lora_dpo.export.card.facts import Facts, mapping_of, number_of, text_of
from lora_dpo.export.card.markdown import bullets, code, details, fenced, table
from lora_dpo.export.card.names import (
    hub_dataset,
    last_part,
    public_recipe,
    public_source,
    public_text,
    sources_of,
)
from lora_dpo.losses import OBJECTIVES, Objective
from lora_dpo.recipe import Recipe, Source

SYMBOLS = (
    "π is the policy, the base with the adapter, and ref its reference; c is the chosen response and r the"
    " rejected one; m = β [(log π(c) − log ref(c)) − (log π(r) − log ref(r))] is the margin, σ the logistic"
    " function. Log-probabilities are sums over a response's tokens unless it says otherwise."
)


def base_link(facts: Facts) -> str:
    """The base's name; a link where it is a hub id, which holds nothing that Markdown could misread."""
    if facts.base_id is None:
        return f"{code(facts.base_name)} (a local folder)"
    return f"[{code(facts.base_id)}](https://huggingface.co/{facts.base_id})"


def called(loss: Objective) -> str:
    beta = number_of(getattr(loss, "beta", None))
    name = code(type(loss).__name__)
    return name if beta is None else f"{name} (β = {beta:g})"


def trained_from(facts: Facts) -> str:
    base = mapping_of(facts.trained_on.get("base"))
    double = facts.trained_on.get("double_quantization", facts.base.double_quantization)
    four_bits = facts.quantization in ("nf4", "fp4")
    compute = text_of(facts.trained_on.get("compute_dtype")) or facts.base.compute_dtype
    rows = {
        "base": base_link(facts),
        "revision": code(text_of(base.get("revision")) or facts.base.revision or ""),
        "commit": code(facts.commit or ""),
        "architecture": code(text_of(base.get("architecture")) or ""),
        "content of its weights (xxh3-128)": code(text_of(base.get("content")) or ""),
        "quantization while training": _quantization(facts.quantization)
        + (", double quantization" if double is True and four_bits else ""),
        "computed in": "" if compute == "auto" else code(compute),
        "chat template (SHA-256)": code(text_of(facts.trained_on.get("template")) or ""),
        "adapter": _adapter(facts.adapter),
        "reference": _reference(facts.recipe),
    }
    shown = [(name, value) for name, value in rows.items() if value]
    unknown = "" if base else "\n\nThe base's commit and the hash of its weights were not recorded."
    return f"## What it was trained from\n\n{table(('', ''), shown)}{unknown}"


def _quantization(kind: str) -> str:
    return "none" if kind == "none" else f"{code(kind)} (bitsandbytes)"


def _adapter(config: Mapping[str, Any]) -> str:
    """Rank, alpha and targets, by PEFT's names."""
    if not config:
        return ""
    rank, alpha, dropout = (number_of(config.get(key)) for key in ("r", "lora_alpha", "lora_dropout"))
    said = ["LoRA"]
    said += [f"rank {rank:g}"] if rank is not None else []
    said += [f"alpha {alpha:g}"] if alpha is not None else []
    said += [f"dropout {dropout:g}"] if dropout else []
    said += [
        name for key, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if config.get(key) is True
    ]
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        value = config.get(key)
        names = sorted(map(str, value)) if isinstance(value, list) else [value] if value else []
        if names:
            said.append(f"{key.replace('_', ' ')} {' '.join(code(name) for name in names)}")
    tokens = config.get("trainable_token_indices")
    said += [f"{len(tokens)} trained tokens"] if isinstance(tokens, list) and tokens else []
    return ", ".join(said)


def _reference(recipe: Recipe | None) -> str:
    """What the policy was compared with."""
    if recipe is None:
        return ""
    if not recipe.loss.needs_reference:
        return "none: the objective needs none"
    kind = recipe.reference.of(recipe.adapter.start_from)
    said = {
        "base": "the base with the adapter off",
        "start": f"the adapter that it started from, {code(last_part(recipe.adapter.start_from))}, frozen",
        "adapter": f"another adapter, {code(last_part(recipe.reference.adapter))}, frozen",
    }[kind]
    every = recipe.reference.sync_every
    return said if every is None else f"{said}; every {every} steps the policy as it was then (TR-DPO)"


def trained_on(facts: Facts) -> str:
    recipe = facts.recipe
    if recipe is None:
        return "## What it was trained on\n\nUnknown: the run is not at hand."
    data, examples = recipe.data, facts.examples
    said = [f"{_source(source)}: training" for source in sources_of(data.train)]
    said += [f"{_source(source)}: held out" for source in sources_of(data.eval) if source != ()]
    if data.eval_fraction:
        said.append(f"held out: the rows of {data.eval_fraction:g} of the prompts, which training didn't see")
    elif data.eval_last:
        said.append(f"held out: the last {data.eval_last:,} rows")
    if examples is not None:
        said.append(f"used: {examples[0]:,} {recipe.loss.records} to train on, {examples[1]:,} held out")
    said.append(_steps(facts, recipe))
    settings = details("The recipe", fenced(_recipe_yaml(recipe), "yaml"))
    note = "Local paths are shown by their last part."
    return f"## What it was trained on\n\n{bullets([s for s in said if s])}\n\n{settings}\n\n{note}"


def _source(source: Any) -> str:
    """A data source by its name, and what was asked of it."""
    hub = hub_dataset(source)
    name = code(public_source(source))
    said = f"[{name}](https://huggingface.co/datasets/{hub})" if hub else name
    if isinstance(source, Source):
        said += f", at most {source.rows:,} rows" if source.rows else ""
        said += f", weight {source.weight:g}" if source.weight != 1 else ""
    return said


def _steps(facts: Facts, recipe: Recipe) -> str:
    steps = [record["step"] for record in facts.records if record.get("kind") == "step"]
    if not steps:
        return ""
    said = f"{max(steps):,} optimizer steps of {recipe.training.pairs_per_step:,} {recipe.loss.records}"
    kept = facts.kept_evaluation
    if recipe.training.best_metric is None or kept is None:
        return said
    best = code(recipe.training.best_metric)
    return f"{said}; kept is the adapter after step {kept['step']:,}, the best by {best}"


def _recipe_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(public_recipe(recipe), sort_keys=False, allow_unicode=True, width=110)


def objective(facts: Facts) -> str:
    if facts.recipe is None:
        return ""
    loss = facts.recipe.loss
    parts = [f"## Objective\n\n{called(loss)}, all its numbers: {code(public_text(repr(loss)))}"]
    if number_of(getattr(loss, "beta", None)) is not None and loss.needs_reference:
        parts.append(
            "β says how strongly the policy is held to its reference: the smaller, the further it may move."
            " The implicit reward of a response is β (log π − log ref), unless the formula says otherwise."
        )
    texts = [text for text in map(_formula, _objectives(loss)) if text]
    if texts:
        of_log_ratios = loss.records == "pairs" and not loss.needs.rewards
        parts += [fenced("\n\n".join(texts), "text"), SYMBOLS if of_log_ratios else ""]
    return "\n\n".join(part for part in parts if part)


def _objectives(loss: Objective) -> list[Objective]:
    """An objective and those that it is made of."""
    inner = [getattr(loss, "of", None), *(getattr(loss, "terms", None) or ())]
    return [loss, *(o for item in inner if isinstance(item, Objective) for o in _objectives(item))]


def _formula(loss: Objective) -> str:
    """The objective in words and as a formula, with its paper; nothing for one that isn't lora_dpo's."""
    name = type(loss).__name__
    if OBJECTIVES.get(name) is not type(loss):
        return f"{name}: an objective of the run's own, which is not part of lora_dpo"
    return f"{name}: {inspect.cleandoc(type(loss).__doc__ or '')}"
