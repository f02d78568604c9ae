"""The quickstart's own base: a tokenizer and a small chat model, trained here from scratch on its
demonstrations.

It is made once and kept in a cache folder, since it takes minutes and is a function of the seed. It is
trained
with the library's own pieces (packing, log-probs, the SFT objective), all parameters this time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, TokenizersBackend

from lora_dpo import run_directory
from lora_dpo.attention import NAME
from lora_dpo.batching import StepSampler
from lora_dpo.losses import SFT
from lora_dpo.model import Model, pick_compute_dtype, pick_device
from lora_dpo.preferences import load_demonstrations
from lora_dpo.quickstart.data import Demonstration, PreferenceRow, demonstrations, preference_rows
from lora_dpo.recipe import Base, Data, Training
from lora_dpo.run_directory import write_folder, write_text
from lora_dpo.tokenization import ChatTokenizer, tokenize
from lora_dpo.training import Display, step_gradient
from lora_dpo.training.optimizer import learning_rate, set_learning_rate

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class BaseSettings:
    """How the base is made; another setting is another cache folder."""

    seed: int = 0
    vocabulary: int = 1024
    width: int = 192
    layers: int = 3
    heads: int = 3
    mlp: int = 640
    demonstrations: int = 14_400
    per_step: int = 32
    learning_rate: float = 3e-3
    preferences: int = 768
    held_out: int = 200


def cache_folder(settings: BaseSettings | None = None) -> Path:
    """Where base and data are kept: under $LORA_DPO_CACHE, or the user's cache folder."""
    settings = settings or BaseSettings()
    name = "-".join(str(value) for value in asdict(settings).values())
    return run_directory.cache_folder() / f"quickstart-{name}"


def quickstart_data(folder: Path, settings: BaseSettings) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl, preference pairs whose prompts differ, unless they are there."""
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    if not (train.exists() and held_out.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        rows = preference_rows(settings.seed, settings.preferences, settings.held_out)
        for file, part in zip((train, held_out), rows, strict=True):
            write_text(file, _lines(part))
    return train, held_out


def _lines(rows: Sequence[PreferenceRow] | Sequence[Demonstration]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def quickstart_base(folder: Path, settings: BaseSettings, display: Display) -> Path:
    """The base's folder; trained and written there first, by one rename, unless it is there."""
    target = folder / "base"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = demonstrations(settings.seed, settings.demonstrations)
        write_text(folder / "demonstrations.jsonl", _lines(rows))
        loaded = load_demonstrations(Data(str(folder / "demonstrations.jsonl")))
        tokenizer = train_tokenizer([m["content"] for row in rows for m in row["messages"]], settings)
        network = new_network(tokenizer, settings)
        device = pick_device(Base("quickstart"))
        # All parameters learn here, without loss scaling: float16 would lose small gradients.
        native = pick_compute_dtype(Base("quickstart"), device) == torch.bfloat16
        dtype = torch.bfloat16 if native else torch.float32
        model = Model(network.to(device), tokenizer, dtype)  # pyright: ignore[reportArgumentType]
        train_base(model, tokenize(loaded.train, ChatTokenizer(tokenizer)).branches, settings, display)

        def fill(part: Path) -> None:
            model.causal.bfloat16().save_pretrained(str(part))
            tokenizer.save_pretrained(str(part))

        write_folder(target, fill)
    return target


def train_tokenizer(texts: Sequence[str], settings: BaseSettings) -> TokenizersBackend:
    """A byte-level BPE with ChatML's turns."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*texts, "user\n", "assistant\n"], trainer)
    tokenizer = TokenizersBackend(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def new_network(tokenizer: TokenizersBackend, settings: BaseSettings) -> LlamaForCausalLM:
    """A Llama of about two million parameters, random."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
    )
    network = LlamaForCausalLM(config)
    network.set_attn_implementation(NAME)
    return network


def train_base(model: Model, branches: Sequence, settings: BaseSettings, display: Display) -> None:
    """One epoch of SFT over all parameters, with AdamW and a cosine schedule."""
    schedule = Training(learning_rate=settings.learning_rate, warmup=0.05, weight_decay=0.01)
    parameters = list(model.trainable.values())
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    sampler = StepSampler(len(branches), settings.per_step, settings.seed)
    steps = sampler.steps(1)
    with display.counting("training the quickstart's base", steps) as advance:
        for step in range(steps):
            items = [branches[n] for n in sampler.step(step)]
            step_gradient(model, SFT(), items, tokens_per_microbatch=8192, seed=step)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            set_learning_rate(optimizer, learning_rate(schedule, step, steps))
            optimizer.step()
            advance(1)
