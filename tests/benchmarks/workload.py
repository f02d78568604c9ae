"""What the benchmarks train, and on what: random Llamas of a stated shape, and pairs that both engines hold.

Legend: `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHARED = Path(__file__).resolve().parents[3] / "shared"


@dataclass(frozen=True)
class Shape:
    """A Llama with an untied head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear layers (norms left out: 2·D of them)."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.intermediate

    @property
    def non_embedding_parameters(self) -> int:
        """All weights but the embedding's and the head's."""
        return self.layers * self.layer_parameters

    @property
    def parameters(self) -> int:
        return self.non_embedding_parameters + 2 * self.hidden * self.vocabulary

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )


def small_shape(vocabulary: int = 16384) -> Shape:
    """40 million parameters at a vocabulary of 16,384."""
    return Shape(512, 8, 8, 8, 1216, vocabulary)


EIGHT_BILLION = Shape(4096, 32, 32, 8, 14336, 128256)
"""The shape of Llama 3.1 8B."""


def save_random_base(shape: Shape, folder: Path, tokenizer: Any, seed: int = 0) -> Path:
    """A random checkpoint in bfloat16 on disk, with a tokenizer: what both engines load and quantize."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantized_in_memory(shape: Shape, device: torch.device, seed: int = 0) -> Any:
    """A random NF4 Llama made layer by layer on the device: no checkpoint, and never whole in 16 bits."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            size = (module.out_features, module.in_features)
            weight = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(
                0, 0.02, generator=generator
            )
            setattr(network.get_submodule(parent), child, _quantized_linear(bnb, weight))
    for name, parameter in list(network.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value.fill_(1.0) if parameter.dim() == 1 else value.normal_(0, 0.02, generator=generator)
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, torch.nn.Parameter(value, requires_grad=False))
    # Its frequencies are a buffer, which was made on the meta device too.
    network.model.rotary_emb = type(network.model.rotary_emb)(network.config).to(device)
    network.is_loaded_in_4bit = True  # what peft and TRL look at
    return network.requires_grad_(False).train()


def _quantized_linear(bnb: Any, weight: torch.Tensor) -> torch.nn.Module:
    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).to(weight.device)
    layer.compute_type_is_set = True
    return layer


def base_tokenizer() -> Any:
    """The tokenizer of the real text: chat-10m's, whose ids stay below 8,192.

    Synthetic pairs need none; for them, where that one is absent, an empty one does.
    """
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = SHARED / "models" / "chat-10m"
    if folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def file_pairs(file: str, tokenizer: Any, max_tokens: int, count: int, seed: int = 0) -> list[Any]:
    """`count` pairs (Branches) of a preference file through lora_dpo's loader and tokenizer, in fixed order.

    Only pairs that TRL can hold too: see `representable`. Raises SystemExit where the file has too few.
    """
    from lora_dpo import ChatTokenizer, Data, load_preferences, tokenize

    records = load_preferences(Data(file, on_bad_row="skip"), seed=seed).train
    order = np.random.default_rng(seed).permutation(len(records))
    chat = ChatTokenizer(tokenizer, max_tokens=max_tokens)
    # A few more than are needed, because some may have to be left out.
    chosen = [records[n] for n in order[: count + count // 4 + 8]]
    branches = tokenize(chosen, chat, skip_refused=True).branches
    pairs = [pair for item in branches if (pair := representable(item)) is not None]
    if len(pairs) < count:
        raise SystemExit(f"{file} gives {len(pairs)} usable pairs; {count} are needed: fewer steps, please")
    return pairs[:count]


def representable(item: Any) -> Any | None:
    """The pair without what follows its last scored tokens, as TRL's three columns can hold it.

    None where the scored tokens of a side aren't one run, or the sides' prompts differ.
    """
    from lora_dpo.tokenization.branches import share

    scored = [np.flatnonzero(mask) for mask in item.scored]
    firsts = {int(at[0]) for at in scored}
    runs = all(len(at) == at[-1] + 1 - at[0] for at in scored)
    (first, *others) = firsts
    if others or not runs or not np.array_equal(item.side(0)[:first], item.side(1)[:first]):
        return None
    ends = [int(at[-1]) + 1 for at in scored]
    ids = [item.side(side)[:end] for side, end in enumerate(ends)]
    masks = [mask[:end] for mask, end in zip(item.scored, ends, strict=True)]
    return share(ids, masks, item.where)


def as_columns(item: Any) -> dict[str, list[int]]:
    """A representable pair as the columns that TRL's collator takes."""
    first = int(item.scored[0].argmax())
    chosen, rejected = item.side(0), item.side(1)
    columns = {"prompt_ids": chosen[:first], "chosen_ids": chosen[first:], "rejected_ids": rejected[first:]}
    return {name: ids.tolist() for name, ids in columns.items()}


def synthetic_pairs(count: int, prompt: int, response: int, vocabulary: int, seed: int = 0) -> list[Any]:
    """Pairs of random tokens, all of one size: a prompt of so many, and two responses of so many."""
    from lora_dpo.preferences import Where
    from lora_dpo.tokenization.branches import share

    rng = np.random.default_rng(seed)
    mask = np.arange(prompt + response) >= prompt
    pairs = []
    for row in range(count):
        ids = rng.integers(3, vocabulary, prompt + 2 * response)
        sides = [np.r_[ids[:prompt], ids[prompt + n * response :][:response]] for n in (0, 1)]
        pairs.append(share(sides, [mask, mask], Where("synthetic", row + 1)))
    return pairs


def sequence_tokens(pairs: Sequence[Any]) -> int:
    """Tokens of both sides of each pair, the shared ones twice: what an engine without sharing computes."""
    return sum(len(item.side(side)) for item in pairs for side in range(item.sides))


def distinct_tokens(pairs: Sequence[Any]) -> int:
    """Tokens of each pair, the shared ones once."""
    return sum(item.tokens for item in pairs)


def scored_tokens(pairs: Sequence[Any]) -> int:
    return sum(item.scored_count(side) for item in pairs for side in range(item.sides))
