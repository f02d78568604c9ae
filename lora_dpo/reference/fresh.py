"""Reference log-probs, computed: what the frozen reference says of a micro-batch."""

from __future__ import annotations

from torch import Tensor

from lora_dpo.batching import MicroBatch
from lora_dpo.logprobs import token_logprobs
from lora_dpo.model import Model, as_reference


def reference_logprobs(model: Model, batch: MicroBatch) -> Tensor:
    """log ref(target) of each score row, float32 [S], without gradient; by the base, or an adapter on it."""
    with as_reference(model):
        return token_logprobs(model, batch)
