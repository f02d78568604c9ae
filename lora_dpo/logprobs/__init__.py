"""A micro-batch through the base in a role → the log-probs of its scored tokens, or the rewards of its sides.

Only score rows reach the LM head, and logits exist by tiles of rows and tokens: what they take depends
neither on how many rows there are nor on the vocabulary.
"""

from lora_dpo.logprobs.head import FrozenHead, Head, head_is_frozen, vocabulary
from lora_dpo.logprobs.rewards import sequence_rewards
from lora_dpo.logprobs.tokens import (
    token_divergence,
    token_logprobs,
    token_logprobs_and_distributions,
    token_logprobs_and_square_sums,
)
from lora_dpo.logprobs.transform import LogitTransform

__all__ = [
    "FrozenHead",
    "Head",
    "LogitTransform",
    "head_is_frozen",
    "sequence_rewards",
    "token_divergence",
    "token_logprobs",
    "token_logprobs_and_distributions",
    "token_logprobs_and_square_sums",
    "vocabulary",
]
