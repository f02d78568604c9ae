"""Typed configuration: one schema and one parser for scripts, YAML and the command line."""

from lora_dpo.recipe.adapter import Adapter, Reference
from lora_dpo.recipe.coerce import field_names
from lora_dpo.recipe.files import from_dict, keys_of, load_recipe, override, pinned, to_dict, to_yaml
from lora_dpo.recipe.sampling import Sampling, sampling_of
from lora_dpo.recipe.schema import Base, Data, Recipe, Source, Training
from lora_dpo.recipe.shift import Shift

__all__ = [
    "Adapter",
    "Base",
    "Data",
    "Recipe",
    "Reference",
    "Sampling",
    "Shift",
    "Source",
    "Training",
    "field_names",
    "from_dict",
    "keys_of",
    "load_recipe",
    "override",
    "pinned",
    "sampling_of",
    "to_dict",
    "to_yaml",
]
