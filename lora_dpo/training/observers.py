"""Who is told of every step: the metrics file, experiment trackers, the display, and the user's own
observers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import Accelerator

from lora_dpo.errors import RecipeError
from lora_dpo.run_directory import RunDirectory


@dataclass(frozen=True)
class Record:
    """What happened: an optimizer step, or an evaluation after one.

    step: how many optimizer steps are done. steps: how many there will be. metrics: name → number; an
    evaluation's names begin with "eval/", and with "shift/" what was measured on the policy's own samples.
    kind: "shift" where only that was measured: before the first step, or where nothing is held out.
    """

    kind: Literal["step", "evaluation", "shift"]
    step: int
    steps: int
    metrics: Mapping[str, float]


Observer = Callable[[Record], None]
"""Called with every record, in order, on the main process."""


def metrics_file(run: RunDirectory) -> Observer:
    """Writes each record as one line of metrics.jsonl."""

    def observe(record: Record) -> None:
        run.append_record({"step": record.step, "kind": record.kind, **record.metrics})

    return observe


def trackers(
    accelerator: Accelerator, project: str, config: dict[str, Any], say: Callable[[str], None]
) -> Observer:
    """Sends each record to the experiment trackers that the accelerator was made with.

    One that fails is said once, and does not end the run: metrics.jsonl has everything.
    """
    failed: set[str] = set()
    accelerator.init_trackers(project, config={key: str(value) for key, value in flat(config).items()})

    def observe(record: Record) -> None:
        try:
            accelerator.log(dict(record.metrics), step=record.step)
        except Exception as error:  # a service that is away, a full disk: each tracker has its own
            if type(error).__name__ not in failed:
                say(f"note: a tracker failed, and the run goes on: {error}")
            failed.add(type(error).__name__)

    return observe


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise RecipeError for a tracker that accelerate does not know or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise RecipeError(f"training.trackers got {name!r}; it takes names from {known}")
        if name not in available:
            raise RecipeError(f"training.trackers names {name}, which is not installed: pip install {name}")
