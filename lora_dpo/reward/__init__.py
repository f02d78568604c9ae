"""Reward models: trained on preference pairs, and put on a base beside its other roles."""

from lora_dpo.reward.applying import RewardModel
from lora_dpo.reward.making import as_reward_recipe, train_reward

__all__ = ["RewardModel", "as_reward_recipe", "train_reward"]
