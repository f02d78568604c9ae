"""The `lora-dpo` command itself."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_dpo.cli.ending import friendly_errors

app = typer.Typer(
    name="lora-dpo",
    help="Align a language model with preferences: DPO with LoRA adapters on one 4-bit base.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The `lora-dpo` command."""
    with friendly_errors():
        app()


@app.callback()
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from lora_dpo import __version__

        print(__version__)
        raise typer.Exit
