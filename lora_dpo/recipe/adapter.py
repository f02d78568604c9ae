"""The recipe's parts about what is trained, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from lora_dpo.bounds import AtLeast
from lora_dpo.errors import RecipeError
from lora_dpo.recipe.adapter_options import INITS, by_module, parse_init, parse_layers, parse_token
from lora_dpo.recipe.coerce import Parsed
from lora_dpo.recipe.section import Count, Positive, Section

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
