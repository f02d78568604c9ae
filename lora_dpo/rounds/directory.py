"""The folder of a loop.

rounds.yaml       the loop's resolved recipe; `lora-dpo rounds rounds.yaml` replays it
prompts.jsonl     the prompts that rounds draw from; held_out.jsonl those that each policy is measured on
rounds.jsonl      one line a policy: round 0 is where it began
round-1/
  samples.jsonl   K responses to each of the round's prompts, by the policy of the round before
  judged.jsonl    the same with rewards
  pairs.jsonl     an ordinary preference file
  run/            an ordinary run directory: what was trained on those pairs
  held_out/       responses of this round's policy to held-out prompts, judged. Nothing is trained on them;
                  pairs of them are what the next round's run is evaluated on
  measures.json   what came of it; seconds.json what each stage took
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.errors import RunError
from lora_dpo.run_directory import RunDirectory, write_text


@dataclass(frozen=True)
class RoundDirectory:
    """The folder of one round."""

    path: Path

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def judged(self) -> Path:
        return self.path / "judged.jsonl"

    @property
    def pairs(self) -> Path:
        return self.path / "pairs.jsonl"

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.path / "run")

    @property
    def held_out(self) -> RoundDirectory:
        """samples and judged, of held-out prompts; pairs made of them."""
        return RoundDirectory(self.path / "held_out")

    @property
    def second_opinion(self) -> Path:
        return self.path / "held_out" / "second_opinion.jsonl"

    @property
    def measures_file(self) -> Path:
        return self.path / "measures.json"

    @property
    def seconds_file(self) -> Path:
        return self.path / "seconds.json"

    def measures(self) -> dict[str, Any] | None:
        """None before the policy was measured. Raises RunError for a file that is not what was written."""
        found = read(self.measures_file)
        if found is not None and not (isinstance(found, dict) and found.keys() >= {"reward", "kl", "guard"}):
            raise RunError(
                f"{self.measures_file} lacks what was measured; delete it, and it is measured again"
            )
        return found

    def count_pairs(self) -> int:
        """How many pairs the round was trained on; 0 before there are any."""
        if not self.pairs.exists():
            return 0
        with self.pairs.open("rb") as lines:
            return sum(1 for _ in lines)

    def seconds(self) -> dict[str, float]:
        try:
            return read(self.seconds_file) or {}
        except RunError:
            return {}  # only told, never decided by

    def took(self, stage: str, seconds: float) -> None:
        """Add to what a stage took: one that was killed and went on took both times."""
        before = self.seconds()
        write_json(self.seconds_file, before | {stage: round(before.get(stage, 0.0) + seconds, 3)})


@dataclass(frozen=True)
class LoopDirectory:
    """The folder of all rounds."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "rounds.yaml"

    @property
    def prompts_file(self) -> Path:
        return self.path / "prompts.jsonl"

    @property
    def held_out_file(self) -> Path:
        return self.path / "held_out.jsonl"

    @property
    def rounds_file(self) -> Path:
        return self.path / "rounds.jsonl"

    def round(self, number: int) -> RoundDirectory:
        return RoundDirectory(self.path / f"round-{number}")

    def begin(self, *, resume: bool) -> None:
        """Make the folder, or with `resume` find the loop in it. Raises RunError if it is the other way."""
        begun = self.recipe_file.exists()
        if begun and not resume:
            raise RunError(
                f"{self.path} already holds rounds. Give --resume to go on with them, or name another folder"
                " with run_directory=…"
            )
        if resume and not begun:
            raise RunError(f"--resume: there are no rounds in {self.path}")
        if RunDirectory(self.path).recipe_file.exists():
            raise RunError(f"{self.path} holds a single run: name another folder with run_directory=…")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"run_directory: cannot make {self.path}: {error}") from error


def read(file: Path) -> Any:
    """What a JSON file that was written whole holds; None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {file}: {error}; delete it, and its stage is done again") from error


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
