"""Tokens a second of `lora_dpo.sampling.sample` beside transformers' `generate(num_return_sequences=K)`.

    python tests/benchmarks/sampling.py [--models chat-10m,random-40m] [--prompts 8] [--repeats 3]

Both draw K=8 responses of exactly 64 tokens (nothing stops) to the same random prompts of 512 tokens, from
the same model in memory: its base in NF4 with a LoRA adapter of rank 16 on; for generate its own attention
(SDPA) and key-value cache, the same dtype, temperature and top-p. generate is timed at several batch sizes,
and its best one counts; lora_dpo as it chooses for itself, and with one prompt at a time. The repeats are
interleaved, one of each in turn, after one of each to warm up, and medians are taken.

Columns: the model, who draws, prompts at a time, seconds (median), tokens of responses a second, and that
rate as a multiple of generate's best. The last line a model is the figure: lora_dpo as it chooses.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import conditions, print_conditions, print_table, write_json
from workload import SHARED, base_tokenizer, save_random_base, small_shape

from lora_dpo.model import Model, add_adapter, as_policy, generating, load_model
from lora_dpo.recipe import Adapter, Base, Sampling
from lora_dpo.sampling import sample
from lora_dpo.sampling.responses import plan

Draw = Callable[[], int]
"""Draws everything once; how many tokens that was."""


def loaded(name: str, folder: Path, options: argparse.Namespace) -> Model:
    """A base in NF4 with a random adapter, whose second factor is not zero."""
    path = SHARED / "models" / name
    if name == "random-40m":
        path = save_random_base(small_shape(options.vocabulary), folder / name, base_tokenizer())
    base = Base(str(path), quantization="nf4", compute_dtype=options.dtype, device=options.device)
    model = add_adapter(load_model(base), Adapter(rank=16))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.trainable.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model


def random_prompts(model: Model, count: int, length: int) -> list[list[int]]:
    known = min(len(model.tokenizer), model.causal.config.vocab_size)  # pyright: ignore[reportArgumentType]
    return np.random.default_rng(0).integers(3, known, (count, length)).tolist()


def ours(model: Model, prompts: Sequence[Sequence[int]], settings: Sampling) -> Draw:
    def draw() -> int:
        made = sample(model, prompts, settings, stop_ids=[])
        return sum(len(response.ids) for row in made for response in row)

    return draw


def generates(model: Model, prompts: Sequence[Sequence[int]], settings: Sampling, batch: int) -> Draw:
    """As `sample` would be without lora_dpo: the prompts in batches, no padding between them."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        num_return_sequences=settings.responses,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    ids = torch.tensor(prompts, device=model.device)
    model.causal.generation_config = GenerationConfig()  # the checkpoint's would fill in what is None

    def draw() -> int:
        made = 0
        with generating(model), as_policy(model):
            for rows in ids.split(batch):
                generate: Any = model.causal.generate
                found = generate(rows, attention_mask=torch.ones_like(rows), generation_config=config)
                made += found[:, ids.shape[1] :].cpu().numel()
        return made

    return draw


def measure(model: Model, options: argparse.Namespace) -> list[tuple[str, int, list[float], int]]:
    """(who, prompts at a time, seconds of each repeat, tokens) of each way to draw."""
    prompts = random_prompts(model, options.prompts, options.prompt_tokens)
    settings = Sampling(
        responses=options.responses, max_new_tokens=options.response_tokens, top_p=options.top_p, seed=1
    )
    alone = Sampling(**{**vars(settings), "tokens_in_cache": 1})
    widths = [
        max(len(wave.prompts) for wave in plan(model, [len(p) for p in prompts], s))
        for s in (alone, settings)
    ]
    batches = [int(size) for size in options.batches.split(",") if int(size) <= options.prompts]
    ways = [("generate", size, generates(model, prompts, settings, size)) for size in batches]
    ways += [("lora_dpo, one at a time", widths[0], ours(model, prompts, alone))]
    ways += [("lora_dpo", widths[1], ours(model, prompts, settings))]
    wanted = options.prompts * options.responses * options.response_tokens
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(options.repeats + 1):
        for times, (name, _, draw) in zip(seconds, ways, strict=True):
            began = time.perf_counter()
            tokens = draw()
            took = time.perf_counter() - began
            if tokens != wanted:
                raise SystemExit(f"{name} drew {tokens} tokens, not {wanted}")
            if repeat:
                times.append(took)
    return [(name, width, times, wanted) for (name, width, _), times in zip(ways, seconds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="chat-10m,random-40m", help="folders of ../shared/models, too")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--batches", default="1,2,4,8", help="prompts at a time that generate is given")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--vocabulary", type=int, default=16384, help="of random-40m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch its own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = conditions()
    print_conditions(found)
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(loaded(name, Path(folder), options), options)
        best = max(tokens / statistics.median(s) for who, _, s, tokens in measured if who == "generate")
        for who, width, seconds, tokens in measured:
            middle = statistics.median(seconds)
            rates = {"s": middle, "tokens/s": tokens / middle, "× generate's best": tokens / middle / best}
            rows.append({"model": name, "who": who, "prompts at a time": width, **rates})
        print_table([row for row in rows if row["model"] == name])
    write_json(options.json, {"conditions": found, "rows": rows})


if __name__ == "__main__":
    main()
