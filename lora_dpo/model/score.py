"""The scalar head of a reward model: beside the LM head on the one base, and its own adapter's.

It is named and saved as transformers' sequence classification names its head, `score`, so that PEFT loads a
reward model's adapter there. The base's own head is all zeros, belongs to no fingerprint of the base, and is
never quantized; every adapter that is a reward model's holds a float32 copy of its own. Nor does transformers
quantize it when it loads such an adapter's base: it leaves a model's last module alone, unless somebody's own
`llm_int8_skip_modules` doesn't name `score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_dpo.errors import ModelError

SCORE = "score"
KEY = f"base_model.model.{SCORE}.weight"
"""Its weight's name in PEFT's files."""

TASK = "SEQ_CLS"
"""What PEFT's config calls an adapter for sequence classification."""


Kind = Literal["policy", "reward", "any"]
"""Whose adapter is asked for: a language model's, a reward model's with its score head, or either."""


class ScoreHead(nn.Linear):
    """float32 [1, D], without a bias; what the base's own holds is never computed with."""


def add_score_head(network: PreTrainedModel) -> None:
    """Put a score head on a base that has none: zeros, on its device, without gradient.

    Raises ModelError where the architecture has something else of that name.
    """
    if is_score_head(getattr(network, SCORE, None)):
        return
    if hasattr(network, SCORE):
        raise ModelError(f"{network.config.model_type} models have a module {SCORE} that is no scalar head")
    width = network.config.get_text_config().hidden_size
    embeddings: Any = network.get_input_embeddings()
    head = ScoreHead(width, 1, bias=False, device=embeddings.weight.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    setattr(network, SCORE, head.requires_grad_(False))


def is_score_head(module: object) -> bool:
    """Whether this is a score head, with or without adapters' copies around it."""
    original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    return isinstance(original, ScoreHead)


def score_weight(network: PreTrainedModel) -> Tensor:
    """The weight [1, D] of the score head that is on now. Raises ModelError where none is."""
    wrapper: Any = getattr(network, SCORE, None)
    active: Sequence[str] = vars(wrapper).get("_active_adapter", ()) if is_score_head(wrapper) else ()
    if not active or vars(wrapper).get("_disable_adapters"):
        raise ModelError(
            "the adapter that is on now has no score head, so it gives no rewards: train one with"
            " `lora-dpo reward train`, or put one on with RewardModel.put_on"
        )
    return wrapper.modules_to_save[active[0]].weight


def holds_score(names: Sequence[str] | None) -> bool:
    """Whether a config's modules_to_save name the score head."""
    return SCORE in (names or ())


def check_score(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ModelError for the tensors of an adapter that has no scalar head. what: opens the error."""
    if KEY not in tensors:
        raise ModelError(f"{what} is no reward model's: it has no score head ({KEY})")
    labels = tensors[KEY].shape[0]
    if labels != 1:
        raise ModelError(f"{what} is a classifier of {labels} labels; a reward model has one (num_labels=1)")


def check_kind(values: Mapping[str, Any], kind: Kind, what: str) -> None:
    """Raise ModelError where an adapter's config is not of the kind that is asked for."""
    reward = values.get("task_type") == TASK
    if kind == "reward" and not reward:
        raise ModelError(
            f"{what} is no reward model's ({values.get('task_type') or 'no task_type'}): those of"
            f" `lora-dpo reward train`, and PEFT's for {TASK}, are"
        )
    if kind == "policy" and reward:
        raise ModelError(
            f"{what} was trained for {TASK}, as a reward model is, which writes no text: it rewards responses"
            " as judge.of=reward:FOLDER; name a language model's here"
        )


def tell_task(network: PeftModel, name: str) -> None:
    """An adapter with a score head is saved as one for sequence classification.

    PEFT is given it as a causal language model's, which is what the base stays in memory.
    """
    config: Any = network.peft_config[name]
    if holds_score(config.modules_to_save):
        config.task_type = TASK
        if isinstance(config.target_modules, set):
            config.target_modules.discard(SCORE)  # it is linear too, but is trained in full
