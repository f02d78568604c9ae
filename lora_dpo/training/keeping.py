"""Which checkpoints a run has: the newest whole one, and which old ones may go."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from lora_dpo.errors import RunError
from lora_dpo.recipe import Training
from lora_dpo.run_directory import RunDirectory, damage, delete_folder


def most_to_come(training: Training, left: int, there: int) -> int:
    """How many more folders of a checkpoint's size may lie on the disk at once before a run has ended.

    left: steps to come. there: checkpoints that lie there already.
    """
    saves = max(1, math.ceil(left / training.save_every) if training.save_every else 1)
    if training.best_metric:
        saves += 1 + left // training.eval_every
    # Besides those that stay there is for a while the next one, and in the end adapter/.
    stay = training.keep_checkpoints + bool(training.best_metric)
    count = min(saves, stay + 1) + 1
    return count - min(there, count - 1)


class Checkpoints:
    """The checkpoints of a run that were seen to be whole, when they were written or read.

    keep: how many of the newest stay.
    """

    def __init__(self, run: RunDirectory, keep: int):
        self._run, self._keep = run, keep
        self._whole: set[Path] = set()
        self._damaged: set[Path] = set()

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """The newest whole one; None where there are none. `say` is told which were passed over, and why.

        Raises RunError where there are some, and none is whole.
        """
        found = self._run.checkpoints()
        for folder in reversed(found):
            wrong = damage(folder)
            if wrong is None:
                self._whole.add(folder)
                return folder
            self._damaged.add(folder)
            say(f"passed over {folder.name}: {wrong}")
        if found:
            raise RunError(
                f"--resume: no checkpoint in {self._run.checkpoints_folder} is whole. Name another"
                " run_directory to begin anew"
            )
        return None

    def newest_written(self) -> Path | None:
        """The newest that is there, unread; None where there is none, or only damaged ones."""
        found = [folder for folder in self._run.checkpoints() if folder not in self._damaged]
        return found[-1] if found else None

    def written(self, folder: Path, best: Path | None) -> None:
        """A checkpoint was just written. It is read back; only then do older ones go, but not the best.

        Raises RunError where the disk does not hold what was written; nothing is deleted then.
        """
        wrong = damage(folder)
        if wrong is not None:
            raise RunError(f"{folder} was written, and is not as it was written: {wrong}. Check that disk")
        self._whole.add(folder)
        self._damaged.discard(folder)
        found = self._run.checkpoints()
        newest = [other for other in found if other in self._whole][-self._keep :]
        for place, other in enumerate(found):
            too_old = len(newest) == self._keep and place < found.index(newest[0])
            if other != best and (too_old or other in self._damaged):
                delete_folder(other)
                self._whole.discard(other)
