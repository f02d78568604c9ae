"""The commands. Heavy imports stand inside the functions, so that `--help` is instant.

Each module registers its commands on `app` when it is imported; their order is that of `lora-dpo --help`.
"""

from lora_dpo.cli import training as training  # isort: skip
from lora_dpo.cli import exporting as exporting  # isort: skip
from lora_dpo.cli import sampling as sampling  # isort: skip
from lora_dpo.cli.app import app, main
from lora_dpo.cli.ending import friendly_errors
from lora_dpo.cli.scripts import recipe_help, run

__all__ = ["app", "friendly_errors", "main", "recipe_help", "run"]
