"""What some models do to their head's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """What some models do to the head's output: logits = softcap(scale · W h)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """From a transformers config: Granite divides, Cohere and Falcon-H1 multiply, Gemma 2 caps."""
        text = config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0)
        scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
        scale /= float(getattr(text, "logits_scaling", None) or 1.0)
        names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        caps = (getattr(text, name, None) for name in names)
        return cls(scale, next((cap for cap in caps if cap), None))

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = logits * self.scale if self.scale != 1.0 else logits
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """d transformed / d logits, from the transformed ones."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (transformed / self.softcap) ** 2)
