"""What several tests are made of: tiny models, random branches, and the plain way to score a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, TokenizersBackend

from lora_dpo.attention import NAME
from lora_dpo.model import Model, add_adapter
from lora_dpo.preferences import Where
from lora_dpo.recipe import Adapter
from lora_dpo.tokenization import Branches

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCABULARY = 97
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def llama_config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    return LlamaConfig(**values | changes)


def float64_model(config: Any, *, rank: int = 4, seed: int = 0, rewards: bool = False) -> Model:
    """A random model in float64 with an adapter whose B is random, not zero, as is the score head that it has
    with `rewards`.
    """
    torch.manual_seed(seed)
    network = build(config).double().requires_grad_(False)
    network.set_attn_implementation(NAME)
    bare = Model(network, None, torch.float64)  # pyright: ignore
    model = add_adapter(bare, Adapter(rank=rank), rewards=rewards)
    return with_random_adapter(model)


def build(config: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def with_random_adapter(model: Model, scale: float = 0.1, seed: int = 1) -> Model:
    """A fresh adapter has B = 0, and with it every gradient of A."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.trainable.items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
        parameter.data = noise.to(dtype)
        assert parameter.requires_grad, name
    return model


def random_branches(
    rng: np.random.Generator, prefix: int, rests: Sequence[int], *, vocabulary: int = VOCABULARY, row: int = 1
) -> Branches:
    """Random tokens; every side is scored from the last shared token on."""
    scored = []
    for rest in rests:
        mask = np.zeros(prefix + rest, dtype=bool)
        mask[max(1, prefix - 1) :] = True
        scored.append(mask)
    tokens = [rng.integers(0, vocabulary, size).astype(np.int32) for size in (prefix, *rests)]
    return Branches(tokens[0], tuple(tokens[1:]), tuple(scored), Where("random", row))


@contextmanager
def float64_throughout():
    """Norms, rotary embeddings and eager softmax upcast to float32, which would spoil a float64
    comparison.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def single_sequence_logprobs(model: Model, item: Branches, attention: str = "eager") -> Tensor:
    """Summed log-probs of each side [k], each run alone through the whole model with its own attention."""
    model.causal.set_attn_implementation(attention)
    try:
        sums = []
        for side in range(item.sides):
            ids = torch.from_numpy(item.side(side).astype(np.int64))
            at = torch.from_numpy(np.flatnonzero(item.scored[side]))
            logits = model.network(input_ids=ids[None], use_cache=False).logits[0].double()
            picked = torch.log_softmax(logits, dim=-1)[at - 1, ids[at]]
            sums.append(picked.sum())
        return torch.stack(sums)
    finally:
        model.causal.set_attn_implementation(NAME)


def gradient(model: Model) -> Tensor:
    """All adapter gradients as one vector; clears them."""
    flat = torch.cat([p.grad.flatten() for p in model.trainable.values()])  # pyright: ignore
    for parameter in model.trainable.values():
        parameter.grad = None
    return flat


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def small_tokenizer() -> TokenizersBackend:
    """A byte-level BPE of 320 tokens with ChatML turns."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(["the cat sat on the mat and the dog ate the red hat in the sun"] * 4, trainer)
    tokenizer = TokenizersBackend(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def save_small_model(folder: Path, **changes: Any) -> Path:
    """A random chat model on disk, with its tokenizer: what a user's local folder looks like."""
    tokenizer = small_tokenizer()
    torch.manual_seed(3)
    config = llama_config(
        vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=None, pad_token_id=0, **changes
    )
    build(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pair_rows(count: int) -> list[dict[str, str]]:
    """Preference rows with a rule a tiny model can pick up: 'yes' words are chosen, 'no' words rejected."""
    rng = np.random.default_rng(5)
    words = ["cat", "dog", "hat", "sun", "mat", "red"]
    rows = []
    for n in range(count):
        ask = " ".join(rng.choice(words, 3))
        rows.append({"prompt": f"{ask} {n}", "chosen": f"the {ask}", "rejected": f"{n} no no {ask[::-1]}"})
    return rows
