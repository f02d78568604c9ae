"""Responses from the base with, or without, its adapters."""

from lora_dpo.sampling.decoding import Response
from lora_dpo.sampling.files import Counts, drawn, read_drawn, sample_to_file, sampler_id
from lora_dpo.sampling.greedy import ROLES, Role, greedy
from lora_dpo.sampling.noise import prompt_key
from lora_dpo.sampling.responses import sample
from lora_dpo.sampling.vllm import VLLM, vllm_never

__all__ = [
    "ROLES",
    "VLLM",
    "Counts",
    "Response",
    "Role",
    "drawn",
    "greedy",
    "prompt_key",
    "read_drawn",
    "sample",
    "sample_to_file",
    "sampler_id",
    "vllm_never",
]
