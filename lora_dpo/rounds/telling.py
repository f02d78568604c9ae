"""What the rounds came to: which was best, whether to go on, and the table that people read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lora_dpo.judging.guard import compare
from lora_dpo.recipe import IterativeRecipe
from lora_dpo.rounds.directory import LoopDirectory
from lora_dpo.run_directory import write_text
from lora_dpo.training import Display
from lora_dpo.training.progress import duration

STAGES = ("sample", "judge", "pair", "train", "measure")


@dataclass(frozen=True)
class Verdict:
    """best: the round with the highest held-out reward within the bound on KL; 0 is where the loop began.
    stop: in words why no further round is made, or empty.
    """

    best: int
    stop: str = ""


def measured(directory: LoopDirectory) -> list[dict[str, Any]]:
    """Each policy's measures so far, from round 0 on."""
    found: list[dict[str, Any]] = []
    while (now := directory.round(len(found)).measures()) is not None:
        found.append(now)
    return found


def verdict(recipe: IterativeRecipe, directory: LoopDirectory) -> Verdict:
    """A function of what was measured so far, so that a loop that goes on decides as it would have before."""
    best, since, stop = 0, 0, ""
    found, rounds = measured(directory), recipe.rounds
    for number, now in enumerate(found[1:], start=1):
        kl = now["kl"]["mean"]
        if rounds.max_kl is not None and kl > rounds.max_kl:
            stop = (
                f"stopped after round {number}: KL(policy ‖ base) is {kl:.3g} nats a response, above"
                f" rounds.max_kl={rounds.max_kl:g}"
            )
            break
        better = now["reward"]["mean"] > found[best]["reward"]["mean"]
        best, since = (number, 0) if better else (best, since + 1)
        if rounds.patience and since >= rounds.patience and number < rounds.count:
            stop = (
                f"stopped after round {number}: the held-out reward did not rise for {since}"
                f" round{'s' if since > 1 else ''} (rounds.patience)"
            )
            break
    return Verdict(best, stop)


def write_rounds(directory: LoopDirectory, found: Verdict) -> None:
    """One line a policy, with its seconds by stage."""
    lines = []
    for number, now in enumerate(measured(directory)):
        here = directory.round(number)
        line = now | {"pairs": here.count_pairs(), "seconds": here.seconds(), "best": number == found.best}
        lines.append(json.dumps(line) + "\n")
    write_text(directory.rounds_file, "".join(lines))


def say_changes(directory: LoopDirectory, number: int, display: Display) -> None:
    """A round's figures, and what speaks for a fooled judge."""
    first, before, now = (directory.round(n).measures() or {} for n in (0, number - 1, number))
    display.say(
        f"round {number}: reward {_shown(before['reward'])} → {_shown(now['reward'])},"
        f" KL {now['kl']['mean']:.3g} nats a response"
    )
    for line in compare(before["guard"], now["guard"], first["guard"]):
        display.say(f"note: {line}")


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def table(directory: LoopDirectory, found: Verdict) -> str:
    """Reward, KL and what might be bought with them, by round; and the time of each stage."""
    policies = measured(directory)
    second = any("held_out_judge" in now for now in policies)
    heads = ["round", "reward [95%]", *(["held-out judge"] if second else []), "KL", "tokens", "repeated"]
    heads += ["unfinished", "pairs", *STAGES]
    rows = [heads]
    for number, now in enumerate(policies):
        here, guard = directory.round(number), now["guard"]
        seconds = here.seconds()
        row = [f"{number}{' *' if number == found.best else ''}", _shown(now["reward"])]
        row += [_shown(now["held_out_judge"])] if second else []
        row += [f"{now['kl']['mean']:.2f}", f"{guard.get('tokens', guard.get('words', 0)):.1f}"]
        row += [f"{guard.get('repetition', 0):.1%}", f"{guard.get('unfinished', 0):.1%}"]
        row.append(str(here.count_pairs() or ""))
        row += [duration(seconds[stage]) if stage in seconds else "" for stage in STAGES]
        rows.append(row)
    widths = [max(len(row[n]) for row in rows) for n in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(
        [*lines, "* best; reward by the judge on held-out prompts; KL(policy ‖ base), nats a response"]
    )
