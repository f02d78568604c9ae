"""How far a policy has moved from the responses that it learns from, seen on its own samples.

The pairs of a data set were written by other models. As the policy improves both responses of a pair can
become unlikely under it: what it says instead is in neither, and their comparison teaches it little about
what it would say (Tajwar et al. 2024, arXiv:2404.14367, on learning from one's own samples; Rafailov et al.
2024, arXiv:2404.12358, on log-probs of both that fall). Log-probs of the data alone show half of this, the
policy's own samples the rest.

Legend: `N` prompts, `d` responses of the data that a prompt has, `K` own samples of each.

A data's response is looked at as far as a sample could go: its first turn, and of that max_new_tokens tokens.
With sums over all prompts and responses of a kind, over scored tokens (the end of turn is one of them):

    shift/own_logps          Σ log π(sample) / Σ tokens, in nats a token: about minus the policy's entropy
    shift/chosen_gap         own_logps − Σ log π(chosen) / Σ tokens: how much less likely a token of it is
    shift/rejected_gap       the same of rejected; where a row has one response, its own name stands there
    shift/kl                 KL(policy ‖ reference) of a response, in nats
    shift/kl_per_token       the same over the samples' mean length
    shift/chosen_change      Σ (log π − log reference)(chosen) / Σ tokens: below 0 where it has become less
    shift/rejected_change    likely than under the reference
    shift/length             tokens of a sample, its end of turn included
    shift/unfinished         share of samples that max_new_tokens ended

Every token counts the same, so that a response of two tokens doesn't weigh as much as one of sixty. The KL is
the mean over samples of log π(sample) − log reference(sample), over the whole sample: unbiased for responses
that end at max_new_tokens (k1 of Schulman 2020, "Approximating KL divergence"). k3 of that note is unbiased
and never negative, but the ratio reference/π in it has no bound where the policy has made tokens rare, which
is when the number is looked at. Where policy and reference agree on every bit both are exactly 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_dpo.batching import MicroBatch
from lora_dpo.evaluation import each_microbatch
from lora_dpo.logprobs import token_logprobs
from lora_dpo.losses import Objective
from lora_dpo.model import Model, as_policy, as_reference
from lora_dpo.preferences import Where
from lora_dpo.recipe import Sampling, Shift
from lora_dpo.sampling import Response, drawn, sample
from lora_dpo.tokenization import Branches
from lora_dpo.tokenization.branches import Ids, Mask, share

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Measured:
    """Sums over scored tokens, the data's responses first, then the samples.

    policy, reference: float64 [N, d + K]. lengths: int64 [N, d + K]. finished: bool [N, K].
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    finished: Tensor


def measure_shift(
    model: Model,
    branches: Sequence[Branches],
    settings: Shift,
    *,
    sides: Sequence[str],
    stop_ids: Sequence[int],
    seed: int = 0,
    tokens_per_microbatch: int = 8192,
    say: Callable[[str], None] = log.warning,
) -> dict[str, float]:
    """`shift/…` on these examples' prompts, as the module describes them; there is at least one example.

    sides: the names of the examples' first sides, those that the data say of this prompt (`data_sides`).
    stop_ids: what ends a response, the end of turn first. seed: of the samples' noise. The noise of a prompt
    is the same at every call, so that what differs between two calls is the policy. torch's random numbers
    aren't touched. The reference is the one that the model has: the base, with all adapters off, where it has
    none. Raises RunError where memory runs out for a single prompt, or its logits are no numbers.
    """
    given = [data_responses(item, len(sides), settings.max_new_tokens) for item in branches]
    sampling = Sampling(responses=settings.responses, max_new_tokens=settings.max_new_tokens, seed=seed)
    prompts = [item.prompt_ids for item in branches]
    made = sample(model, [ids.tolist() for ids in prompts], sampling, stop_ids=stop_ids, say=say)
    items = [side_by_side(item, responses, stop_ids) for item, responses in zip(given, made, strict=True)]
    finished = torch.tensor([[response.finished for response in responses] for responses in made])
    return metrics(_measured(model, items, finished, tokens_per_microbatch, say), sides)


def data_sides(objective: Objective) -> tuple[str, ...]:
    """The sides of its examples that the data give to their prompt: a rating's second side belongs to another
    row.
    """
    return objective.sides if objective.records == "pairs" else objective.sides[:1]


def some_prompts(
    branches: Sequence[Branches], count: int, *, seed: int, longest: int | None = None
) -> list[Branches]:
    """One example each of `count` distinct prompts, in an order that is a function of the seed; fewer, where
    there are no more. longest: prompts of more tokens are passed over.
    """
    found: dict[bytes, Branches] = {}
    for n in np.random.default_rng(seed).permutation(len(branches)):
        if len(found) == count:
            break
        prompt = branches[n].prompt_ids
        if longest is None or len(prompt) <= longest:
            found.setdefault(prompt.tobytes(), branches[n])
    return list(found.values())


def data_responses(item: Branches, sides: int, tokens: int) -> Branches:
    """The first sides of an example, each cut behind its first turn, and that to so many tokens."""
    ids, scored = [], []
    for n in range(sides):
        mask = item.scored[n]
        start = int(mask.argmax())
        turn = len(mask) - start if mask[start:].all() else int(mask[start:].argmin())
        end = start + min(turn, tokens)
        ids.append(item.side(n)[:end])
        scored.append(mask[:end])
    return share(ids, scored, item.where)


def side_by_side(item: Branches, responses: Sequence[Response], stop_ids: Sequence[int]) -> Branches:
    """The sides of an example, and samples under the prompt of its first one; nothing is tokenized again.

    The token that ended a sample is scored with it.
    """
    own, own_scored = _under(item.prompt_ids, [drawn(response, stop_ids) for response in responses])
    ids = [*(item.side(n) for n in range(item.sides)), *own]
    return share(ids, [*item.scored, *own_scored], item.where)


def _under(prompt: Ids, responses: Sequence[Sequence[int]]) -> tuple[list[Ids], list[Mask]]:
    """The ids of responses under a prompt, and which of them are scored: all of the response."""
    ids = [np.concatenate([prompt, np.array(response, dtype=np.int32)]) for response in responses]
    return ids, [np.arange(len(own)) >= len(prompt) for own in ids]


def sampled_log_ratios(
    model: Model,
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    tokens_per_microbatch: int = 8192,
    say: Callable[[str], None] = log.warning,
) -> Tensor:
    """log π(response | prompt) − log reference(response | prompt) in nats: float64 [N, K].

    prompts: token ids, int32 [tokens] each. responses: K to each prompt, the tokens that were drawn. Where
    the policy drew them at temperature 1 from all tokens, the mean is an unbiased estimate of
    KL(policy ‖ reference) of a response. Nothing is tokenized: the ids that a text gives are often others
    than those that were drawn, and under the policy less likely.
    """
    items = []
    for n, (prompt, own) in enumerate(zip(prompts, responses, strict=True)):
        ids, scored = _under(np.asarray(prompt, dtype=np.int32), own)
        items.append(share(ids, scored, Where("a sample", n + 1)))
    measured = _measured(model, items, torch.empty(0), tokens_per_microbatch, say)
    return measured.policy - measured.reference


def _measured(
    model: Model, items: Sequence[Branches], finished: Tensor, budget: int, say: Callable[[str], None]
) -> Measured:
    """Both roles over the same micro-batches: a policy that is its reference is it to the bit."""
    shape = len(items), items[0].sides
    policy, reference = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    lengths = torch.zeros(shape, dtype=torch.int64)

    def add(batch: MicroBatch, examples: list[int]) -> None:
        with as_policy(model):
            policy[examples] = batch.per_sequence(token_logprobs(model, batch)).cpu()
        with as_reference(model):
            reference[examples] = batch.per_sequence(token_logprobs(model, batch)).cpu()
        lengths[examples] = batch.scored_lengths().cpu()

    each_microbatch(model, items, add, tokens_per_microbatch=budget, say=say)
    return Measured(policy, reference, lengths, finished)


def metrics(measured: Measured, sides: Sequence[str]) -> dict[str, float]:
    """`shift/…` out of sums; sides: the names of the first columns, all others are own samples."""
    d = len(sides)
    policy, reference, lengths = measured.policy, measured.reference, measured.lengths
    own_tokens = lengths[:, d:].sum()
    own = policy[:, d:].sum() / own_tokens
    apart = policy[:, d:] - reference[:, d:]
    found = {
        "own_logps": own,
        "kl": apart.mean(),
        "kl_per_token": apart.sum() / own_tokens,
        "length": lengths[:, d:].double().mean(),
        "unfinished": 1 - measured.finished.double().mean(),
    }
    for n, side in enumerate(sides):
        tokens = lengths[:, n].sum()
        found[f"{side}_gap"] = own - policy[:, n].sum() / tokens
        found[f"{side}_change"] = (policy[:, n] - reference[:, n]).sum() / tokens
    return {f"shift/{name}": float(value) for name, value in found.items()}
