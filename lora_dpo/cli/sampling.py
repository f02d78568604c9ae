"""`lora-dpo sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_dpo.cli.app import app

if TYPE_CHECKING:
    from lora_dpo.sampling import Counts


@app.command("sample", context_settings={"allow_extra_args": True})
def sample_command(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_RECIPE", help="Whose policy answers; of a recipe, the base.")
    ],
    prompts: Annotated[str, typer.Option(metavar="DATA", help="Rows with a prompt: a file or a hub id.")],
    output: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where the responses go.")],
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many prompts, at random.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run too, let the base answer.")] = False,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Draw by vLLM, on a CUDA card (pip install 'lora-dpo[vllm]').")
    ] = False,
) -> None:
    """Draw several responses to each prompt.

    Keys can follow: responses=8 temperature=1.0 top_p=1.0 max_new_tokens=256 seed=0 tokens_in_cache=null; and
    keys of the recipe, such as base.device=cpu.

    One line of JSON a prompt, written when its responses are done. The same command goes on with a file
    that was begun; what is there is not drawn again.
    """
    from lora_dpo.answering import answer_prompts
    from lora_dpo.training import Display

    display = Display()
    counts = answer_prompts(
        source,
        prompts,
        output,
        words=context.args,
        limit=limit,
        base_only=base,
        vllm=vllm,
        display=display,
    )
    for line in described(counts):
        display.say(line)
    display.say(f"responses: {output}")


def described(counts: Counts) -> list[str]:
    """What was done, in words."""
    lines = []
    if counts.repeated:
        lines.append(f"{counts.repeated:,} rows repeat the prompt of another one: answered once")
    if counts.too_long:
        lines.append(f"{counts.too_long:,} prompts are longer than data.max_tokens allows: left out")
    if counts.known:
        lines.append(f"{counts.known:,} of {counts.prompts:,} prompts were answered before")
    if counts.responses:
        ended, length = counts.finished / counts.responses, counts.tokens / counts.responses
        lines.append(
            f"{counts.responses:,} responses to {counts.prompts - counts.known:,} prompts: {length:.0f}"
            f" tokens each, {ended:.0%} ended by themselves, {counts.tokens / counts.seconds:,.0f} tokens/s"
        )
    return lines
