"""`lora-dpo reward`: the group of its commands."""

from __future__ import annotations

import typer

from lora_dpo.cli.app import app

reward_app = typer.Typer(help="Reward models and other judges.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(reward_app, name="reward")
