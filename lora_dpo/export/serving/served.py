"""An adapter as a server meets it: its config, the shapes of its tensors, its template and the base's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lora_dpo.errors import ModelError
from lora_dpo.model import Stored, load_config, load_tokenizer, read_header, template_hash
from lora_dpo.model.adapter_config import lora_config
from lora_dpo.model.saved import CONFIG, TENSORS
from lora_dpo.model.stored import base_file
from lora_dpo.model.trust import read_json
from lora_dpo.recipe import Base
from lora_dpo.sampling.vllm import VLLM_RANKS

TEMPLATE = "chat_template.jinja"
ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
"""Of the names of LoRA's factors."""


@dataclass(frozen=True)
class Served:
    """What the checks look at.

    values: adapter_config.json. ranks: of the plain factors, by module. tied: whether the base's head is its
    embeddings; None where its config can't be read. stored_as: what the base's files are quantized by; None
    where they are not, or are not here. template, base_template: chat templates, None for none;
    template_known: whether both could be read.
    """

    folder: Path
    base: Base
    values: dict[str, Any]
    config: LoraConfig
    tensors: list[Stored]
    ranks: dict[str, int]
    tied: bool | None
    stored_as: str | None
    template: str | None
    base_template: str | None
    template_known: bool

    @property
    def largest_rank(self) -> int:
        return max(self.ranks.values(), default=self.config.r)

    @property
    def serving_rank(self) -> int | None:
        """The smallest --max-lora-rank that is enough; None where none is."""
        return next((rank for rank in VLLM_RANKS if rank >= self.largest_rank), None)

    @property
    def quantized_alike(self) -> bool:
        """Whether vLLM's --quantization bitsandbytes gives the weights that were trained on."""
        return self.base.quantization == "nf4" and self.base.double_quantization

    @property
    def other_template(self) -> bool:
        """Whether prompts are rendered otherwise than by the base's own template."""
        return self.template_known and template_hash(self.template) != template_hash(self.base_template)


def look_at(adapter: Path, base: Base) -> Served:
    """Read what the checks need: config, headers, templates. Raises ModelError."""
    values = read_json(adapter / CONFIG, "the adapter")
    what = f"the adapter in {adapter}"
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{what} is of the kind {values.get('peft_type')!r:.40}; LoRA adapters are taken")
    config = lora_config(values, what)
    tensors = read_header(adapter / TENSORS)
    own = _template(adapter)
    known, theirs = _base_template(base) if own is not None else (False, None)
    return Served(
        folder=adapter,
        base=base,
        values=values,
        config=config,
        tensors=tensors,
        ranks=dict(_ranks(tensors, config)),
        tied=_tied(base),
        stored_as=_stored_as(base),
        template=own,
        base_template=theirs,
        template_known=known,
    )


def _module(name: str) -> str:
    """The module that a tensor belongs to: "model.layers.0.self_attn.q_proj"."""
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name.removeprefix("base_model.model.")


def _ranks(tensors: Iterable[Stored], config: LoraConfig) -> Iterator[tuple[str, int]]:
    """(module, rank) of the factors of single matrices; those of experts are stacked."""
    experts = {name.rpartition(".")[0] for name in config.target_parameters or ()}
    for tensor in tensors:
        if not tensor.name.endswith((".lora_A.weight", ".lora_embedding_A")) or len(tensor.shape) != 2:
            continue
        module = _module(tensor.name)
        place = module.removesuffix(".base_layer")
        if not any(place == name or place.endswith(f".{name}") for name in experts):
            yield module, tensor.shape[0]


def _tied(base: Base) -> bool | None:
    try:
        return bool(load_config(base).get_text_config().tie_word_embeddings)
    except ModelError:
        return None


def _stored_as(base: Base) -> str | None:
    file = base_file(base, "config.json")
    found = read_json(file, "base.model").get("quantization_config") if file is not None else None
    return str(found.get("quant_method") or "an unknown method") if isinstance(found, dict) else None


def _template(folder: Path) -> str | None:
    """The chat template that lies with an adapter."""
    try:
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        if (folder / "tokenizer_config.json").is_file():
            found = read_json(folder / "tokenizer_config.json", "the adapter").get("chat_template")
            return found if isinstance(found, str) else None
    except (OSError, ValueError) as error:
        raise ModelError(f"the adapter's chat template in {folder} cannot be read: {error}") from error
    return None


def _base_template(base: Base) -> tuple[bool, str | None]:
    """(whether the base's tokenizer could be read, its template)."""
    try:
        found = load_tokenizer(base).chat_template
    except ModelError:
        return False, None
    return True, found if isinstance(found, str) else None
