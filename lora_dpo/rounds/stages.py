"""The stages of a round. Each leaves a file that is whole or goes on where it was, and is not done twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_dpo.errors import DataError
from lora_dpo.judging import NoPairsError, judge_file, judge_on, pair_file
from lora_dpo.preferences import Prompt
from lora_dpo.recipe import IterativeRecipe, Judge, Sampling
from lora_dpo.rounds.directory import RoundDirectory, write_json
from lora_dpo.rounds.judges import same_judge
from lora_dpo.rounds.measuring import measure
from lora_dpo.rounds.policies import Loop, recipe_of_round
from lora_dpo.rounds.prompts import prompts_of_round
from lora_dpo.sampling import sample_to_file, sampler_id
from lora_dpo.training import train


class NoPairs(Exception):
    """Nothing is left to prefer among a later round's responses: the loop has come to its end."""


def do_round(loop: Loop, number: int) -> None:
    """What is left of a round, counted from 1. Raises NoPairs, but in the first round DataError."""
    here = loop.directory.round(number)
    if not here.pairs.exists():
        with _timed(here, "sample"):
            prompts = prompts_of_round(loop.recipe, loop.prompts, number)
            sample_stage(loop, number - 1, prompts, seeded(loop.recipe.sampling, f"round {number}"), here)
        with _timed(here, "judge"):
            first = loop.directory.round(0).held_out.judged
            judge_stage(loop, number - 1, loop.recipe.judge, here.samples, here.judged, first)
        with _timed(here, "pair"):
            pair_stage(loop, number)
    if not here.run.has_adapter:
        with _timed(here, "train"):
            train_stage(loop, number)
    measure_stage(loop, number)


def sample_stage(
    loop: Loop, number: int, prompts: Sequence[Prompt], settings: Sampling, here: RoundDirectory
) -> None:
    """Responses of the policy after a round to these prompts; those that are there already stay."""
    here.path.mkdir(parents=True, exist_ok=True)
    data, stop_ids = loop.recipe.data, loop.chat.end_of_turn_ids
    longest = data.max_prompt_tokens or data.max_tokens
    with loop.policy_after(number) as policy:
        made = sample_to_file(
            policy,
            loop.chat,
            prompts,
            settings,
            here.samples,
            sampler=sampler_id(policy, settings, stop_ids, base=loop.fingerprint),
            display=loop.display,
            longest=longest,
        )
    if not made.prompts:
        raise DataError(
            f"rounds: all {len(prompts):,} prompts of {here.path} are longer than {longest:,} tokens"
            " (data.max_prompt_tokens, or data.max_tokens)"
        )
    if made.too_long:
        loop.display.say(f"{made.too_long} prompts are longer than data.max_prompt_tokens, and are left out")


def judge_stage(loop: Loop, number: int, judge: Judge, samples: Path, output: Path, first: Path) -> None:
    """Judge what the policy after a round said. A judge that is an adapter has the base for itself; the
    implicit reward of the policy takes the policy. first: what the same judge wrote first.
    """
    whose = loop.policy_after(number) if judge.of == "implicit" else nullcontext(loop.base)
    with whose as model, judge_on(judge, model, loop.chat, say=loop.display.say) as made:
        judge_file(same_judge(judge, made, first), samples, output, loop.display)


def pair_stage(loop: Loop, number: int) -> None:
    here = loop.directory.round(number)
    try:
        paired = pair_file(here.judged, here.pairs, loop.recipe.pairing, round=number)
    except NoPairsError as error:
        if number == 1:
            raise
        raise NoPairs(f"round {number} ends the loop: {error}") from error
    for line in paired.lines():
        loop.display.say(f"round {number}: {line}")


def train_stage(loop: Loop, number: int) -> None:
    """The round's run, begun or gone on with, on the base in memory."""
    here = loop.directory.round(number)
    first = max(1, number - loop.recipe.rounds.earlier_pairs)
    pairs = [loop.directory.round(n).pairs for n in range(first, number + 1)]
    recipe = recipe_of_round(
        loop.recipe,
        number,
        last=loop.adapter_after(number - 1),
        pairs=pairs,
        held_out=held_out_pairs(loop, number - 1),
        run=here.run.path,
    )
    begun = here.run.recipe_file.exists() or bool(here.run.checkpoints())
    accept = loop.accept if begun else ()
    train(recipe, resume=begun, accept=accept, on=loop.base, quiet=loop.display.quiet)


def held_out_pairs(loop: Loop, number: int) -> Path | None:
    """Pairs of the held-out responses of the policy after a round; None where they give none."""
    there = loop.directory.round(number).held_out
    if not there.pairs.exists():
        try:
            pair_file(there.judged, there.pairs, loop.recipe.pairing, round=number)
        except NoPairsError:
            return None  # no two responses that differ enough: training then has nothing to evaluate on
    return there.pairs


def measure_stage(loop: Loop, number: int) -> None:
    """Responses of the policy after a round to held-out prompts, and what they show."""
    here = loop.directory.round(number)
    if here.measures() is not None:
        return
    with _timed(here, "measure"):
        there, second = here.held_out, loop.recipe.held_out_judge
        sample_stage(loop, number, loop.held_out, held_out_sampling(loop.recipe), there)
        begun = loop.directory.round(0)
        judge_stage(loop, number, loop.recipe.judge, there.samples, there.judged, begun.held_out.judged)
        if second is not None:
            judge_stage(loop, number, second, there.samples, here.second_opinion, begun.second_opinion)
        with loop.policy_after(number) as policy:
            write_json(here.measures_file, {"round": number} | measure(loop, policy, here))


def held_out_sampling(recipe: IterativeRecipe) -> Sampling:
    """The same noise after every round: what differs is the policy. And of the policy itself, at
    temperature 1 from all tokens, or its samples would not give its KL divergence.
    """
    count = recipe.rounds.held_out_responses
    return seeded(recipe.sampling, "held out", responses=count, temperature=1.0, top_p=1.0)


def seeded(sampling: Sampling, what: str, **changes: Any) -> Sampling:
    """The sampling with noise of its own for each use."""
    digest = hashlib.sha256(f"{sampling.seed} {what}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:7], "big"), **changes)


@contextmanager
def _timed(here: RoundDirectory, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        here.took(stage, time.monotonic() - started)
