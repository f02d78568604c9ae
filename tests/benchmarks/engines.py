"""lora_dpo's step and TRL's, behind one interface, each to be measured in a process of its own.

python tests/benchmarks/engines.py JOB.json RESULT.json     (the benchmarks call this)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import PeakMemory
from torch import nn
from workload import (
    EIGHT_BILLION,
    as_columns,
    base_tokenizer,
    distinct_tokens,
    file_pairs,
    quantized_in_memory,
    scored_tokens,
    sequence_tokens,
    synthetic_pairs,
)

from lora_dpo.errors import RunError

BETA = 0.1
RANK, ALPHA = 16, 32
SEED = 0


@dataclass(frozen=True)
class Job:
    """One measurement: which engine, what model, which pairs, how many steps.

    base: a checkpoint's folder, or "" for the 8B shape made in memory. data: a preference file, or "" for
    synthetic pairs of prompt_tokens and 2 × response_tokens. tokens_per_microbatch is lora_dpo's,
    pairs_per_forward (per_device_train_batch_size) TRL's. search: find the longest side that trains, up to
    this. threads: 0 leaves torch its own choice.
    """

    engine: str
    base: str = ""
    data: str = ""
    pairs_per_step: int = 4
    max_tokens: int = 1024
    prompt_tokens: int = 256
    response_tokens: int = 384
    steps: int = 5
    warmup: int = 1
    compute_dtype: str = "bfloat16"
    checkpointing: bool = False
    tokens_per_microbatch: int = 8192
    pairs_per_forward: int = 1
    learning_rate: float = 5e-5
    threads: int = 0
    cuda: bool = False
    cuda_memory_gb: float = 0.0
    second_epoch: bool = False
    search: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")


@dataclass
class Run:
    """What an engine did: seconds and loss of each step, and the tokens that went through the model once."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    processed: list[int] = field(default_factory=list)

    def add(self, other: Run) -> None:
        self.seconds += other.seconds
        self.losses += other.losses
        self.processed += other.processed


class LoraDpo:
    """lora_dpo's own path: pack, step_gradient, clip, AdamW."""

    def __init__(self, job: Job):
        from lora_dpo.losses import DPO
        from lora_dpo.recipe import Training
        from lora_dpo.training.optimizer import make_optimizer

        self.job = job
        self.model = _lora_dpo_model(job)
        if job.checkpointing:
            self.model.checkpoint_layers()
        same_start(self.model.trainable.items())
        self.objective = DPO(beta=BETA)
        self.optimizer = make_optimizer(Training(learning_rate=job.learning_rate), self.model.trainable)

    def run(self, steps: Sequence[Sequence[Any]], cache: Any = None) -> Run:
        run = Run()
        for step, pairs in enumerate(steps):
            began = time.perf_counter()
            run.losses.append(self.step(pairs, step, cache))
            run.seconds.append(time.perf_counter() - began)
            run.processed.append(distinct_tokens(pairs))
        return run

    def step(self, pairs: Sequence[Any], step: int, cache: Any = None) -> float:
        """One optimizer step, to the end of the device's work; returns the loss."""
        from lora_dpo.training.step import step_gradient, step_seed

        extra = {} if cache is None else {"cache": cache}
        sums = step_gradient(
            self.model,
            self.objective,
            pairs,
            tokens_per_microbatch=self.job.tokens_per_microbatch,
            seed=step_seed(SEED, step),
            **extra,
        )
        nn.utils.clip_grad_norm_(list(self.model.trainable.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if cache is not None:
            cache.commit()
        _finish(self.job.device)
        return sums.loss.item()


class Trl:
    """TRL's DPOTrainer as a user would set it up for the same mathematics; `compare_trl.py` says how."""

    def __init__(self, job: Job, pairs: Sequence[Any]):
        self.job = job
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = _pretokenized_trainer()(
            model=_trl_base(job),
            args=_trl_arguments(job, self.folder.name),
            train_dataset=_dataset(pairs),
            processing_class=base_tokenizer(),
            peft_config=_peft_config(),
            callbacks=[],
        )
        parameters = [(n, p) for n, p in self.trainer.model.named_parameters() if p.requires_grad]
        if job.dtype == torch.float32:
            for _, parameter in parameters:
                # TRL stores the adapter of a quantized model in bfloat16.
                parameter.data = parameter.data.float()
        same_start(parameters)

    def run(self, steps: Sequence[Sequence[Any]]) -> Run:
        trainer = self.trainer
        trainer.run = Run()
        trainer.micro_losses, trainer.finish = [], lambda: _finish(self.job.device)
        trainer.train_dataset = _dataset([pair for pairs in steps for pair in pairs])
        trainer.args.max_steps = len(steps)
        trainer.run.processed = [self._check(pairs) for pairs in steps]
        trainer.train()
        run = trainer.run
        parts = len(trainer.micro_losses) // len(steps)
        run.losses = [
            math.fsum(float(loss) for loss in trainer.micro_losses[n * parts : (n + 1) * parts]) / parts
            for n in range(len(steps))
        ]
        return run

    def _check(self, pairs: Sequence[Any]) -> int:
        """Tokens of a step with TRL's padding. AssertionError unless TRL sees and scores the same ones."""
        width, padded, real, scored = self.job.pairs_per_forward, 0, 0, 0
        for start in range(0, len(pairs), width):
            batch = self.trainer.data_collator([as_columns(pair) for pair in pairs[start : start + width]])
            padded += batch["input_ids"].numel()
            real += int(batch["attention_mask"].sum())
            scored += int(batch["completion_mask"].sum())
        assert real == sequence_tokens(pairs), "TRL cut or changed the sequences"
        assert scored == scored_tokens(pairs), "TRL scores other tokens"
        return padded


def _pretokenized_trainer() -> Any:
    """DPOTrainer that takes token ids as they are, and notes each step's time and loss."""
    from transformers import TrainerCallback
    from trl import DPOTrainer  # pyright: ignore[reportMissingImports]

    class Clock(TrainerCallback):
        """Seconds from one step's end to the next: fetching, padding, both passes, the update."""

        def __init__(self, trainer: Any):
            self.trainer = trainer

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.trainer.finish()
            now = time.perf_counter()
            self.trainer.run.seconds.append(now - self.last)
            self.last = now

    class PreTokenized(DPOTrainer):
        def __init__(self, **arguments: Any):
            super().__init__(**arguments)
            self.micro_losses: list[Any] = []
            self.add_callback(Clock(self))

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            # It would tokenize text; the pairs come as the ids that lora_dpo made.
            return dataset

        def compute_loss(self, *positional: Any, **named: Any) -> Any:
            loss = super().compute_loss(*positional, **named)
            self.micro_losses.append(loss.detach())
            return loss

    return PreTokenized


def _trl_arguments(job: Job, folder: str) -> Any:
    from trl import DPOConfig  # pyright: ignore[reportMissingImports]

    accumulation, rest = divmod(job.pairs_per_step, job.pairs_per_forward)
    assert not rest, "pairs_per_step must be a multiple of pairs_per_forward"
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=job.pairs_per_forward,
        gradient_accumulation_steps=accumulation,
        max_steps=job.warmup + job.steps,
        beta=BETA,
        max_length=None,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        # Where losses are compared, the very update of the other engine; else TRL's own default.
        optim="adamw_torch" if job.dtype == torch.float32 else "adamw_torch_fused",
        bf16=job.dtype == torch.bfloat16,
        gradient_checkpointing=job.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if job.checkpointing else None,
        train_sampling_strategy="sequential",
        use_cpu=not job.cuda,
        dataloader_pin_memory=job.cuda,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )


def _trl_base(job: Job) -> Any:
    if not job.base:
        network = quantized_in_memory(EIGHT_BILLION, job.device)
        network.set_attn_implementation("sdpa")
        return network
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=job.dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        job.base,
        dtype=job.dtype,
        device_map={"": job.device},
        quantization_config=quantization,
        attn_implementation="sdpa",
    )


def _peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"
    )


def _lora_dpo_model(job: Job) -> Any:
    from lora_dpo.attention import NAME
    from lora_dpo.model import Model, add_adapter, load_model
    from lora_dpo.recipe import Adapter, Base

    adapter = Adapter(rank=RANK, alpha=ALPHA, dropout=0.0)
    if job.base:
        device: Any = job.device.type
        dtype: Any = job.compute_dtype
        return load_model(Base(job.base, compute_dtype=dtype, device=device), adapter, seed=SEED)
    network = quantized_in_memory(EIGHT_BILLION, job.device)
    network.set_attn_implementation(NAME)
    return add_adapter(Model(network, base_tokenizer(), torch.bfloat16), adapter, seed=SEED)


def _dataset(pairs: Sequence[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([as_columns(pair) for pair in pairs])


def same_start(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """The adapter's first values from the seed alone, the same in both engines: peft's default, B = 0."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(parameters):
        value = torch.zeros(parameter.shape)
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            value.uniform_(-bound, bound, generator=generator)
        parameter.data.copy_(value)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reference_cache(engine: LoraDpo, folder: Path) -> Any | None:
    """lora_dpo's on-disk cache of reference log-probs; None in a version that has none."""
    try:
        from lora_dpo import reference

        cache, identity = reference.ReferenceCache, reference.reference_identity  # pyright: ignore
    except AttributeError:
        return None
    model = engine.model
    return cache(folder / "reference.sqlite", identity(model), dtype=model.compute_dtype)


def measure(job: Job) -> dict[str, Any]:
    """Set an engine up, run its steps, and say what they took."""
    if job.threads:
        torch.set_num_threads(job.threads)
    if job.cuda_memory_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(job.cuda_memory_gb * 2**30 / total)
    if job.search:
        return {"job": asdict(job), "longest": _longest_that_trains(job)}
    steps = _steps(job)
    engine = make_engine(job, steps[0])
    with PeakMemory(job.device) as memory:
        run = engine.run(steps)
    kept = slice(job.warmup, None)
    found = {
        "job": asdict(job),
        "seconds": run.seconds[kept],
        "losses": run.losses,
        "pairs": job.pairs_per_step * job.steps,
        "distinct_tokens": sum(distinct_tokens(pairs) for pairs in steps[kept]),
        "processed_tokens": sum(run.processed[kept]),
        "scored_tokens": sum(scored_tokens(pairs) for pairs in steps[kept]),
        "peak_bytes": memory.bytes,
        "threads": torch.get_num_threads(),
        "base": base_fingerprint(engine),
    }
    if job.second_epoch and isinstance(engine, LoraDpo):
        found["second_epoch"] = _second_epoch(engine, steps, kept, memory.start)
    return found


def make_engine(job: Job, pairs: Sequence[Any]) -> LoraDpo | Trl:
    return Trl(job, pairs) if job.engine == "trl" else LoraDpo(job)


def _steps(job: Job) -> list[list[Any]]:
    """The pairs of each step, warm-up first."""
    count, width = job.pairs_per_step * (job.warmup + job.steps), job.pairs_per_step
    if job.data:
        pairs = file_pairs(job.data, base_tokenizer(), job.max_tokens, count)
    else:
        pairs = synthetic_pairs(count, job.prompt_tokens, job.response_tokens, vocabulary=8192)
    return [pairs[start : start + width] for start in range(0, count, width)]


def _second_epoch(
    engine: LoraDpo, steps: list[list[Any]], kept: slice, above: int | None
) -> dict[str, Any] | None:
    """The same steps with their reference log-probs read from the cache that an epoch before filled.

    Each is run once without the cache right before: a machine whose speed drifts drifts for both. above: what
    was in use before the very first step, so that both epochs' memory is counted from there.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = reference_cache(engine, Path(folder))
        if cache is None:
            return None
        with cache:
            engine.run(steps, cache)
            assert cache.hits == 0
            without, run = Run(), Run()
            with PeakMemory(engine.job.device, above) as memory:
                for pairs in steps:
                    without.add(engine.run([pairs]))
                    run.add(engine.run([pairs], cache))
            assert cache.hits == sum(map(len, steps)), "the second epoch was not read from the cache"
    return {
        "seconds": run.seconds[kept],
        "seconds_without_cache": without.seconds[kept],
        "losses": run.losses,
        "peak_bytes": memory.bytes,
    }


def base_fingerprint(engine: LoraDpo | Trl) -> str:
    """A hash of the frozen weights' bytes: two engines with one hash trained on one base."""
    network = engine.model.network if isinstance(engine, LoraDpo) else engine.trainer.model
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _longest_that_trains(job: Job) -> int:
    """The longest side (prompt + response, half each, one pair a step) of which two steps fit.

    By bisection, in multiples of 64 tokens; 0 where not even 64 fit. Two steps, because the second has the
    optimizer's state beside it.
    """
    engine = make_engine(job, synthetic_pairs(1, 32, 32, 8192))
    fits, fails = 0, job.search // 64 + 1
    while fails - fits > 1:
        trial = (fits + fails) // 2
        if _trains(engine, synthetic_pairs(2, 32 * trial, 32 * trial, 8192)):
            fits = trial
        else:
            fails = trial
    return fits * 64


def _trains(engine: LoraDpo | Trl, pairs: Sequence[Any]) -> bool:
    import gc

    try:
        engine.run([[pair] for pair in pairs])
        return True
    except (torch.OutOfMemoryError, RunError):  # ours names the row that does not fit
        return False
    finally:
        network = engine.model.network if isinstance(engine, LoraDpo) else engine.trainer.model
        network.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_fresh_process(job: Job) -> dict[str, Any]:
    """`measure` in a process of its own: clean memory, and no library has touched another's settings."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "job.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(asdict(job)))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if job.threads:
            environment["OMP_NUM_THREADS"] = str(job.threads)
        done = subprocess.run(
            [sys.executable, __file__, str(asked), str(answer)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{job}\nfailed:\n{done.stdout[-6000:]}")
        return json.loads(answer.read_text())


def main() -> None:
    asked, answer = map(Path, sys.argv[1:3])
    answer.write_text(json.dumps(measure(Job(**json.loads(asked.read_text())))))


if __name__ == "__main__":
    main()
