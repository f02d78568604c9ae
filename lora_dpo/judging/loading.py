"""A sequence-classification model from the hub or a folder: safetensors only, no code of its own.

Legend: `B` conversations, `C` labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from lora_dpo.errors import ModelError, RecipeError
from lora_dpo.model import content_hash
from lora_dpo.model.trust import check_folder, check_weights, without_hints
from lora_dpo.recipe import Base, Judge

LONGEST = 2**20
"""Tokens; tokenizers that know no limit say an astronomic number."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """model: its name. limit: the longest conversation in tokens. pad: the token that a batch is padded with;
    None for a model that names none. label: which of several labels counts. content: a hash of its files.
    """

    model: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limit: int
    pad: int | None
    label: int | None
    content: str

    def rewards(self, logits: Tensor) -> Tensor:
        """[B] out of logits [B, C]."""
        if self.label is None:
            return logits[:, 0]
        kind = self.network.config.problem_type
        if kind == "regression":
            return logits[:, self.label]
        logprobs = (
            torch.nn.functional.logsigmoid(logits)
            if kind == "multi_label_classification"
            else logits.log_softmax(-1)
        )
        return logprobs[:, self.label]


def load_classifier(judge: Judge, say: Callable[[str], None]) -> Classifier:
    """Raises ModelError where it can't be had, or its head isn't in its files; RecipeError where it has
    several labels and none is named.
    """
    name = judge.what
    place = _place(name, judge)
    config = _call(
        name, lambda: AutoConfig.from_pretrained(place, revision=judge.revision, trust_remote_code=False)
    )
    without_hints(config)
    label = _label(judge, config)
    tokenizer = _call(
        name, lambda: AutoTokenizer.from_pretrained(place, revision=judge.revision, trust_remote_code=False)
    )
    cuda = torch.cuda.is_available()
    network, loaded = _call(
        name,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            place,
            revision=judge.revision,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype="auto" if cuda else torch.float32,
            device_map={"": torch.cuda.current_device() if cuda else "cpu"},
        ),
    )
    missing = sorted(map(str, loaded.get("missing_keys", ())))
    if missing:
        raise ModelError(
            f"judge.of: {name} is no trained classifier: its weights lack {missing[0]}, which would be random"
        )
    network.requires_grad_(False).eval()
    # The files are here now.
    content = _call(name, lambda: content_hash(Base(str(place), revision=judge.revision), say=say))
    pad = config.get_text_config().pad_token_id
    limit = _limit(judge, config, tokenizer)
    return Classifier(name, network, tokenizer, limit, pad, label, content)


def _place(name: str, judge: Judge) -> str:
    """A folder, checked, or a hub id."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise ModelError(f"judge.of: there is no folder {name}")
        # Given an adapter, transformers would take the base that it names instead.
        if _call(name, lambda: find_adapter_config_file(name, revision=judge.revision)) is not None:
            raise ModelError(f"judge.of: {name} is an adapter; reward:FOLDER takes one, on its base")
        return name
    if judge.revision is not None:
        raise RecipeError(f"judge.revision got {judge.revision!r}; a local folder, {name}, has none")

    def check() -> None:
        check_folder(folder)
        check_weights(folder)

    _call(name, check)
    return str(folder)


def _call(name: str, load: Callable[[], Any]) -> Any:
    """What `load` gives. Whatever is raised over somebody else's files becomes a ModelError of our key."""
    try:
        return load()
    except ModelError as error:
        raise ModelError(str(error).replace("base.model", "judge.of")) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own, which is not run here"
        raise ModelError(f"judge.of: {name} cannot be loaded as a classifier: {reason}") from error


def _label(judge: Judge, config: Any) -> int | None:
    """The number of the label that counts; None where there is one output only."""
    names = {int(number): str(name) for number, name in config.id2label.items()}
    if config.num_labels == 1:
        if judge.label is not None:
            raise RecipeError(f"judge.label got {judge.label!r}; {judge.what} has one output: leave it out")
        return None
    known = ", ".join(f"{number} {name}" for number, name in sorted(names.items()))
    if judge.label is None:
        raise RecipeError(f"judge.label: {judge.what} has several labels, name the good one: {known}")
    for number, name in names.items():
        if judge.label in (name, str(number)):
            return number
    raise RecipeError(f"judge.label got {judge.label!r}; {judge.what} has {known}")


def _limit(judge: Judge, config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    text = config.get_text_config()
    own = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    # RoBERTa's positions begin behind that of its padding.
    offset = (text.pad_token_id or 0) + 1 if text.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    known = [int(size) - (offset if n == 0 else 0) for n, size in enumerate(own) if size and size < LONGEST]
    limit = min(known, default=LONGEST)
    if judge.max_tokens is not None and judge.max_tokens > limit:
        raise RecipeError(f"judge.max_tokens got {judge.max_tokens}; {judge.what} takes at most {limit}")
    return judge.max_tokens or limit
