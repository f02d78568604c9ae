"""Objectives against TRL's on the same model, pairs and adapter: values, and gradients by the adapter.

Skipped where TRL isn't installed (the extra "bench"). TRL's loss function runs on a stand-in for its model
that scores padded rows with plain logits, in float64.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import float64_model, float64_throughout, gradient, llama_config, random_branches, relative

from lora_dpo.attention import NAME
from lora_dpo.losses import (
    AOT,
    BCO,
    DPO,
    EXO,
    IPO,
    LDDPO,
    NCA,
    SPPO,
    WPO,
    APODown,
    APOZero,
    ChosenSFT,
    DiscoPOP,
    Hinge,
    Objective,
    RobustDPO,
    Sum,
)
from lora_dpo.model import Model, as_policy, as_reference
from lora_dpo.tokenization import Branches
from lora_dpo.training.step import step_gradient

trl = pytest.importorskip("trl")

ALPHA = 0.4

CASES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "sigmoid": (DPO(), {}),
    "sigmoid, forward KL": (DPO(divergence="forward_kl"), {"f_divergence_type": "forward_kl"}),
    "sigmoid, Jensen-Shannon": (DPO(divergence="jensen_shannon"), {"f_divergence_type": "js_divergence"}),
    "sigmoid, α": (
        DPO(divergence="alpha", alpha=ALPHA),
        # TRL's exponent is α − 1 where the paper's is −α.
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - ALPHA},
    ),
    "hinge": (Hinge(), {"loss_type": "hinge"}),
    "ipo": (IPO(), {"loss_type": "ipo"}),
    "ipo, forward KL": (
        IPO(divergence="forward_kl"),
        {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
    ),
    "exo_pair": (EXO(label_smoothing=0.05), {"loss_type": "exo_pair", "label_smoothing": 0.05}),
    "nca_pair": (NCA(), {"loss_type": "nca_pair"}),
    "robust": (RobustDPO(label_smoothing=0.2), {"loss_type": "robust", "label_smoothing": 0.2}),
    "bco_pair": (BCO(momentum=None), {"loss_type": "bco_pair"}),
    "sppo_hard": (SPPO(), {"loss_type": "sppo_hard"}),
    "aot": (AOT(label_smoothing=0.1), {"loss_type": "aot", "label_smoothing": 0.1}),
    "aot_unpaired": (AOT(paired=False), {"loss_type": "aot_unpaired"}),
    "apo_zero": (APOZero(), {"loss_type": "apo_zero"}),
    "apo_down": (APODown(), {"loss_type": "apo_down"}),
    "discopop": (DiscoPOP(), {"loss_type": "discopop"}),
    "sft": (ChosenSFT(), {"loss_type": "sft"}),
    "sigmoid_norm": (DPO(average=True), {"loss_type": "sigmoid_norm"}),
    "LD-DPO": (LDDPO(alpha=0.3), {"ld_alpha": 0.3}),
    "LD-DPO of IPO": (LDDPO(of=IPO(), alpha=0.6), {"ld_alpha": 0.6, "loss_type": "ipo"}),
    "WPO": (WPO(), {"use_weighting": True}),
    "WPO of NCA": (WPO(of=NCA()), {"use_weighting": True, "loss_type": "nca_pair"}),
    "MPO": (
        Sum((DPO(), BCO(momentum=None), ChosenSFT()), (0.8, 0.2, 1.0)),
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
}


@pytest.fixture(scope="module")
def model() -> Model:
    with float64_throughout():
        return float64_model(llama_config())


@pytest.fixture(scope="module")
def pairs() -> list[Branches]:
    rng = np.random.default_rng(0)
    shapes = [(9, (5, 8)), (4, (11, 3)), (7, (6, 6)), (12, (2, 9)), (5, (7, 4))]
    return [random_branches(rng, prefix, rests) for prefix, rests in shapes]


@pytest.mark.parametrize("name", CASES)
def test_value_and_adapter_gradient_equal_trls(name: str, model: Model, pairs: list[Branches]):
    """To 1e-7 relative; ours packed into several micro-batches. TRL keeps EXO's ε and LD-DPO's α in float32,
    the others agree to 1e-13.
    """
    objective, options = CASES[name]
    with float64_throughout():
        sums = step_gradient(model, objective, pairs, tokens_per_microbatch=40, seed=0)
        ours = gradient(model)
        theirs = trl_loss(model, pairs, narrow="alpha" in options.get("f_divergence_type", ""), **options)
        theirs.backward()
        expected = gradient(model)
    assert sums.loss.item() == pytest.approx(theirs.item(), rel=1e-7)
    assert relative(ours, expected) <= 1e-7


def trl_loss(model: Model, pairs: list[Branches], *, narrow: bool, **options: Any) -> torch.Tensor:
    """DPOTrainer's own loss of these pairs, with adapters on as its model and off as its reference.

    narrow: give it float32 log-probs; its α-divergence knows no float64.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's own use of transformers
        args = trl.DPOConfig(output_dir="unused", report_to=[], use_cpu=True, **options)
    trainer: Any = object.__new__(trl.DPOTrainer)
    same = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda x: x,
    )
    loss_types = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    settings = {
        "args": args,
        "accelerator": same,
        "model": Rows(model, as_policy, narrow),
        "ref_model": Rows(model, as_reference, narrow),
        "loss_types": loss_types,
        "loss_weights": args.loss_weights or [1.0] * len(loss_types),
        "beta": args.beta,
        "label_smoothing": args.label_smoothing,
        "ld_alpha": args.ld_alpha,
        "f_divergence_type": args.f_divergence_type,
        "f_alpha_divergence_coef": args.f_alpha_divergence_coef,
        "use_weighting": args.use_weighting,
        "precompute_ref_logps": False,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for key, value in settings.items():
        setattr(trainer, key, value)
    sides = [(pair, side) for side in (0, 1) for pair in pairs]
    longest = max(len(pair.side(side)) for pair, side in sides)
    ids = torch.zeros(len(sides), longest, dtype=torch.int64)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (pair, side) in enumerate(sides):
        tokens = torch.from_numpy(pair.side(side).astype(np.int64))
        ids[row, : len(tokens)], attention[row, : len(tokens)] = tokens, 1
        completion[row, : len(tokens)] = torch.from_numpy(pair.scored[side].astype(np.int64))
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    return trainer._compute_loss(trainer.model, inputs, return_outputs=False)


class Rows(torch.nn.Module):
    """Scores right-padded rows one by one, as what TRL calls its model does."""

    is_gradient_checkpointing = False

    def __init__(self, model: Model, role: Any, narrow: bool):
        super().__init__()
        self.model, self.role, self.narrow = model, role, narrow

    def forward(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any
    ) -> SimpleNamespace:
        logprobs = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, dtype=torch.float64)
        squares = torch.zeros_like(logprobs)
        causal = self.model.causal
        causal.set_attn_implementation("eager")
        with self.role(self.model):
            for row, length in enumerate(attention_mask.sum(dim=1).tolist()):
                tokens = input_ids[row, :length]
                kept = torch.arange(length - 1)
                logits = causal(input_ids=tokens[None], logits_to_keep=kept, use_cache=False).logits
                every = torch.log_softmax(logits[0], dim=-1)
                logprobs[row, : length - 1] = every.gather(1, tokens[1:, None])[:, 0]
                squares[row, : length - 1] = torch.logsumexp(2 * every.detach(), dim=-1)
        causal.set_attn_implementation(NAME)
        # As TRL's own: nothing where no label is.
        logprobs = logprobs.masked_fill(labels[:, 1:] == -100, 0.0)
        if self.narrow:
            logprobs = logprobs.float()
        zeros = torch.zeros_like(squares)
        return SimpleNamespace(
            log_probs=logprobs, log_sum_sq_probs=squares, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )
