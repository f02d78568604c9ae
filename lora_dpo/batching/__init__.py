"""Branches → packed micro-batches, each shared prefix once, and which examples make up a step."""

from lora_dpo.batching.layout import Block, BranchLayout, sent
from lora_dpo.batching.microbatch import MicroBatch, collate
from lora_dpo.batching.packing import Way, cost, halved, pack
from lora_dpo.batching.steps import StepSampler

__all__ = [
    "Block",
    "BranchLayout",
    "MicroBatch",
    "StepSampler",
    "Way",
    "collate",
    "cost",
    "halved",
    "pack",
    "sent",
]
