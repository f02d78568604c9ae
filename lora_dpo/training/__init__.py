"""The loop, on accelerate, and the checks before it."""

from lora_dpo.stopping import Stopped
from lora_dpo.training.data import HeldOut, TrainingData, chat_tokenizer, prepare_data, prepare_held_out
from lora_dpo.training.observers import Observer, Record
from lora_dpo.training.preflight import preflight
from lora_dpo.training.progress import Display
from lora_dpo.training.shift_meter import ShiftMeter
from lora_dpo.training.start import reference_cache, train
from lora_dpo.training.step import step_gradient
from lora_dpo.training.trainer import Trainer

__all__ = [
    "Display",
    "HeldOut",
    "Observer",
    "Record",
    "ShiftMeter",
    "Stopped",
    "Trainer",
    "TrainingData",
    "chat_tokenizer",
    "preflight",
    "prepare_data",
    "prepare_held_out",
    "reference_cache",
    "step_gradient",
    "train",
]
