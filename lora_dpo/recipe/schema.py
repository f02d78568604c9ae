"""The recipe's schema: frozen dataclasses that describe a run completely, each checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from lora_dpo.bounds import AtLeast
from lora_dpo.errors import RecipeError
from lora_dpo.losses import DPO, Objective
from lora_dpo.recipe.adapter_options import INITS, by_module, parse_init, parse_layers, parse_token
from lora_dpo.recipe.coerce import Parsed, coerce, hints_of, refusal

Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]
Positive = Annotated[float, AtLeast(0, exclusive=True)]
NotNegative = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, AtLeast(0, high=1)]


def parse_rows(value: Any, key: str) -> Any:
    """A `datasets.Dataset` given from Python, as it is."""
    columns = getattr(value, "column_names", None)
    if isinstance(columns, list) and hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return value
    if isinstance(columns, dict):
        raise RecipeError(f"{key} got a DatasetDict; give one of its splits: {', '.join(columns)}")
    raise refusal(key, value, "a path, a hub id or a datasets.Dataset")


Rows = Annotated[Any, Parsed(parse_rows, "a datasets.Dataset")]


class Section:
    """A part of the recipe whose fields are parsed and checked by their types when it is made."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for item in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            key = f"{self.section}.{item.name}".lstrip(".")
            object.__setattr__(self, item.name, coerce(hints[item.name], getattr(self, item.name), key))


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


INIT = Annotated[str, Parsed(parse_init, f"one of {', '.join(INITS)}")]
Layers = Annotated[str | None, Parsed(parse_layers, 'layers such as "0:8", "-4:" or "0,1,5", or null')]
Token = Annotated[int | str, Parsed(parse_token, "a token's text or its id")]
Ranks = Annotated[dict[str, int], Parsed(by_module(Count), "ranks by module name, such as {q_proj: 8}")]
Alphas = Annotated[dict[str, float], Parsed(by_module(Positive), "alphas by module name")]


@dataclass(frozen=True)
class Adapter(Section):
    """LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3): W + (alpha / rank) · B A, with A and B in float32.

    targets: "all-linear" is every linear layer but the head, routers, and the output of Mamba mixers, whose
    kernels would pass an adapter by; or a list of module names such as q_proj, or of ends of their paths such
    as layers.3.mlp.down_proj, which names one layer's.
    layers: only these layers: "0:8" the first eight, "-4:" the last four, "0,1,30:".
    ranks, alphas: other values for modules by name or end of path: {q_proj: 8, layers.0.mlp.up_proj: 64}
    (regular expressions; the first that fits counts).
    rslora: scale by alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732), for large ranks.
    dora: magnitude and direction are trained apart (Liu et al. 2024, arXiv:2402.09353, eq. 5); slower.
    init: "default" (A uniform, B = 0), "gaussian" and "eva" (Paischer et al. 2024, arXiv:2410.07170: A from
    what the data give to each layer) start at zero. "pissa" (Meng et al. 2024, arXiv:2404.02948) starts from
    the base's principal singular directions, "olora" (Büyükakyüz 2024, arXiv:2406.01775) from its QR factors;
    the base stays as it is, a frozen copy of the start is subtracted, and the exported adapter has twice the
    rank.
    lora_plus_ratio: B's learning rate over A's (Hayou et al. 2024, arXiv:2402.12354, who suggest 16).
    trained_tokens: tokens, by text or id, whose embeddings are trained too.
    modules_to_save: names of whole modules that are trained in full, in float32, such as lm_head.
    expert_targets: parameters that hold all experts of a layer, such as mlp.experts.gate_up_proj; each expert
    gets a low-rank product.
    start_from: the folder of an adapter to train further, in PEFT's layout, or of the run that made it. What
    the adapter is (rank, alpha, targets, trained tokens, saved modules) is then read from there, and the keys
    here that say so are left out; dropout stays the recipe's. `Reference` says what it is compared with.
    """

    section: ClassVar[str] = "adapter"
    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, AtLeast(0, high=0.95)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    layers: Layers = None
    ranks: Ranks = field(default_factory=dict)
    alphas: Alphas = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init: INIT = "default"
    lora_plus_ratio: Positive = 1.0
    trained_tokens: tuple[Token, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    expert_targets: tuple[str, ...] = ()
    start_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets and not self.expert_targets:
            raise RecipeError(
                "adapter.targets got an empty list; it takes all-linear or names such as q_proj"
            )
        subtracts = self.init in ("pissa", "olora")
        if self.dora and subtracts:
            raise RecipeError(
                f"adapter.dora rescales W + B A, from which adapter.init={self.init} could not be subtracted;"
                " use init=default with dora, or leave dora off"
            )
        if self.expert_targets:
            self._check_experts(subtracts)

    def _check_experts(self, subtracts: bool) -> None:
        clashes = {
            "adapter.dora": self.dora,
            "adapter.dropout": self.dropout > 0,
            f"adapter.init={self.init}": subtracts or self.init == "eva",
        }
        for name, clash in clashes.items():
            if clash:
                raise RecipeError(f"{name} does not go with adapter.expert_targets; leave one of them out")
        if self.layers is not None:
            raise RecipeError(
                "adapter.layers does not choose among adapter.expert_targets; name the layers there, such as"
                " layers.0.mlp.experts.gate_up_proj"
            )


@dataclass(frozen=True)
class Reference(Section):
    """What the policy is compared with. An objective that needs no reference loads none.

    kind: "base" is the base with all adapters off; "start" the adapter that training starts from
    (adapter.start_from), frozen; "adapter" another one, from the folder that `adapter` names; "auto" is the
    adapter where one is named, else the start where there is one, else the base.
    sync_every: every so many steps the reference becomes the policy as it is then (TR-DPO's hard update,
    Gorbatovski et al. 2024, arXiv:2404.09656). sync_alpha: TR-DPO's α; only 1, the hard update, is exact.
    """

    section: ClassVar[str] = "reference"
    kind: Literal["auto", "base", "start", "adapter"] = "auto"
    adapter: str | None = None
    sync_every: Count | None = None
    sync_alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "adapter" and not self.adapter:
            raise RecipeError("reference.kind=adapter needs reference.adapter, the folder of the adapter")
        if self.adapter and self.kind not in ("auto", "adapter"):
            raise RecipeError(
                f"reference.adapter and reference.kind={self.kind} name different references: keep one"
            )
        if self.sync_alpha != 1:
            raise RecipeError(
                f"reference.sync_alpha got {self.sync_alpha:g}; it takes 1, the hard update. The average of"
                " two adapters' factors, αB + (1−α)B_ref and αA + (1−α)A_ref, is not the average of their"
                " products B·A: it would not be TR-DPO's soft update. Use the hard one, reference.sync_every"
            )
        if self.adapter and self.sync_every:
            raise RecipeError(
                "reference.sync_every copies the policy into a reference of the same shape, which"
                " reference.adapter need not be: start from it (adapter.start_from), or leave one of them out"
            )

    def of(self, start_from: str | None) -> Literal["base", "start", "adapter"]:
        """The kind, or what "auto" stands for, given adapter.start_from. RecipeError if they don't fit."""
        if self.kind == "auto":
            return "adapter" if self.adapter else "start" if start_from else "base"
        if self.kind == "start" and not start_from:
            raise RecipeError(
                "reference.kind=start needs adapter.start_from: a fresh adapter starts as the base"
            )
        if self.kind == "base" and start_from and self.sync_every:
            raise RecipeError(
                "reference.sync_every needs a reference that has the policy's shape from the start, and"
                " reference.kind=base has none beside adapter.start_from: leave reference.kind out"
            )
        return self.kind


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
    format: "auto" recognises the layout row by row; "text" takes already rendered strings as they are.
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
    run_directory: str = "runs/latest"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reference.of(self.adapter.start_from)
