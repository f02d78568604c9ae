"""The recipe's schema: frozen dataclasses that describe a run completely, each checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from lora_dpo.bounds import AtLeast
from lora_dpo.errors import RecipeError
from lora_dpo.losses import DPO, Objective
from lora_dpo.recipe.adapter import Adapter, Reference
from lora_dpo.recipe.coerce import Parsed, refusal
from lora_dpo.recipe.section import Count, CountOrZero, Fraction, NotNegative, Positive, Section
from lora_dpo.recipe.shift import Shift


def parse_rows(value: Any, key: str) -> Any:
    """A `datasets.Dataset` given from Python, as it is."""
    columns = getattr(value, "column_names", None)
    if isinstance(columns, list) and hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return value
    if isinstance(columns, dict):
        raise RecipeError(f"{key} got a DatasetDict; give one of its splits: {', '.join(columns)}")
    raise refusal(key, value, "a path, a hub id or a datasets.Dataset")


Rows = Annotated[Any, Parsed(parse_rows, "a datasets.Dataset")]


@dataclass(frozen=True)
class Base(Section):
    """The frozen model underneath.

    model: a hub id or a local folder. revision: a branch, tag or commit of the hub id.
    quantization: how the linear layers are stored. double_quantization: quantize the 4-bit scales too. A
    checkpoint that bitsandbytes quantized before is loaded as it is, and both must be what it has.
    compute_dtype: what matrix products run in; "auto" is bfloat16 where the device has it, else float16 on a
    card and float32 on a CPU.
    device: "auto" takes CUDA where there is one, else the CPU.
    trust_remote_code: run Python code that comes with the model. Leave it off unless you have read that code.
    fused_kernels: Liger's RMSNorm, SwiGLU and RoPE in place of the model's own (CUDA, and the extra "liger").
    """

    section: ClassVar[str] = "base"
    model: str
    revision: str | None = None
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quantization: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    trust_remote_code: bool = False
    fused_kernels: bool = False


@dataclass(frozen=True)
class Source(Section):
    """One place rows come from.

    path: a file (.json, .jsonl, .parquet, .csv, .arrow; .gz too), a folder, or a hub id. A hub id, and a
    folder, may name a split and a configuration: "org/name:split" or "org/name:config:split".
    weight: how often its rows are met in an epoch: 0.5 takes a random half of them, 2 takes each twice.
    rows: at most this many rows are read.
    """

    section: ClassVar[str] = "data.train"
    path: str
    weight: Positive = 1.0
    rows: Count | None = None


@dataclass(frozen=True)
class Data(Section):
    """The preference pairs (demonstrations for SFT, ratings for KTO), and how they become tokens.

    train: one source or several: paths, hub ids, or (from Python) a `datasets.Dataset`.
    eval: sources held out; or give eval_fraction (a share of the prompts) or eval_last (the last n rows of
    the training source). max_rows, max_eval_rows: caps on the rows used.
    format: "auto" recognises the layout row by row; "text" takes already rendered strings as they are: what
    looks like a control token in them is one, so they must come from somebody you trust.
    chat_template: a Jinja template, or the path of a file that holds one, instead of the tokenizer's own.
    max_tokens: longest side, prompt and response. max_prompt_tokens: longest prompt; its end is kept.
    on_bad_row: "stop" at the first row that cannot be used, or "skip" and count by reason.
    workers: how many processes tokenize, this one included; 0 or 1 is this one alone. By default others join,
    one for each CPU, when more than some seconds of work are left.
    """

    section: ClassVar[str] = "data"
    train: str | Source | Rows | tuple[str | Source | Rows, ...]
    eval: str | Source | Rows | tuple[str | Source | Rows, ...] = ()
    eval_fraction: Annotated[float, AtLeast(0, high=0.9)] = 0.0
    eval_last: CountOrZero = 0
    max_rows: Count | None = None
    max_eval_rows: Count | None = None
    format: Literal["auto", "text"] = "auto"
    chat_template: str | None = None
    max_tokens: Annotated[int, AtLeast(8)] = 1024
    max_prompt_tokens: Count | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    workers: CountOrZero | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = [k for k in ("eval", "eval_fraction", "eval_last") if getattr(self, k)]
        if len(ways) > 1:
            raise RecipeError(f"data.{ways[0]} and data.{ways[1]} both choose evaluation rows: keep one")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens >= self.max_tokens:
            raise RecipeError(
                f"data.max_prompt_tokens got {self.max_prompt_tokens}; it takes a number below"
                f" data.max_tokens ({self.max_tokens}), or no response would fit"
            )


@dataclass(frozen=True)
class Training(Section):
    """The mathematics of a step (pairs_per_step, learning_rate, …), and what it may cost.

    pairs_per_step: pairs of one optimizer step. tokens_per_microbatch: packed tokens in memory at a time; it
    changes memory and speed, never the gradient. epochs: passes over the pairs; max_steps ends sooner.
    warmup: share of the steps over which the learning rate rises. max_grad_norm: 0 does not clip.
    gradient_checkpointing: "layers" recomputes each layer in the backward pass, for memory; "offload" also
    keeps the layers' inputs in main memory meanwhile (CUDA; for the longest examples); "none" is fastest,
    where it fits.
    eval_every, save_every: steps between evaluations and checkpoints; 0 is at the end only. What a crash
    costs is the steps since the last checkpoint.
    on_bad_step: where the loss, a log-prob or the gradient of a step isn't a number, "stop" ends the run,
    naming the rows; "skip" leaves adapter and optimizer as they were, counts the step, and goes on.
    keep_checkpoints: how many of the newest stay on disk, besides the best one.
    best_metric: which evaluation metric chooses the adapter that is kept, such as "rewards/accuracy" (a loss
    is better when lower). early_stopping: stop after this many evaluations without a better one; 0 never.
    trackers: names that accelerate knows, such as tensorboard, wandb, mlflow or trackio.
    reference_cache: keep the reference's log-probs on disk, and read them in later epochs, runs, evaluations.
    They lie in reference/ under $LORA_DPO_CACHE (else ~/.cache/lora_dpo), one file for each base as it was
    loaded; that folder may be deleted whenever no run is using it.
    """

    section: ClassVar[str] = "training"
    pairs_per_step: Annotated[int, AtLeast(1, high=1_000_000)] = 16
    tokens_per_microbatch: Count = 8192
    epochs: Annotated[float, AtLeast(0, high=1_000_000, exclusive=True)] = 1.0
    max_steps: Count | None = None
    learning_rate: Positive = 5e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.1
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    adam_beta1: Annotated[float, AtLeast(0, high=0.99999)] = 0.9
    adam_beta2: Annotated[float, AtLeast(0, high=0.99999)] = 0.999
    adam_epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    on_bad_step: Literal["stop", "skip"] = "stop"
    gradient_checkpointing: Literal["none", "layers", "offload"] = "layers"
    seed: Annotated[int, AtLeast(0, high=2**63 - 1)] = 0
    eval_every: CountOrZero = 0
    save_every: CountOrZero = 100
    keep_checkpoints: Count = 2
    best_metric: str | None = None
    early_stopping: CountOrZero = 0
    trackers: tuple[str, ...] = ()
    reference_cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_stopping and not self.best_metric:
            raise RecipeError("training.early_stopping needs training.best_metric, such as rewards/accuracy")
        if (self.early_stopping or self.best_metric) and not self.eval_every:
            raise RecipeError("training.best_metric needs training.eval_every, in steps")
        if self.best_metric and self.best_metric.startswith("eval/"):
            raise RecipeError(f"training.best_metric got {self.best_metric!r}; leave out the eval/ in front")


@dataclass(frozen=True)
class Recipe(Section):
    """A whole run. `run_directory` is where everything that it makes is written."""

    base: Base
    data: Data
    loss: Objective = field(default_factory=DPO)
    adapter: Adapter = field(default_factory=Adapter)
    reference: Reference = field(default_factory=Reference)
    training: Training = field(default_factory=Training)
    shift: Shift = field(default_factory=Shift)
    run_directory: str = "runs/latest"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reference.of(self.adapter.start_from)
