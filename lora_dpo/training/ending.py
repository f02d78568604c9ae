"""What a run leaves when it ends: its adapter, and the one that was its reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_dpo.model import REFERENCE, Model, TrainedOn, save_adapter, write_record
from lora_dpo.run_directory import RunDirectory, damage, step_of, write_folder
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training.checkpoint import restore_adapter, restore_reference


def keep_best(folder: Path, model: Model, metric: str | None, say: Callable[[str], None]) -> None:
    """Put the adapter of the best checkpoint on the model; where that is damaged, the last step's stays.

    metric: by which it was chosen. say: is told which one is kept.
    """
    step, wrong = step_of(folder.name), damage(folder)
    if wrong is not None:
        say(
            f"note: the best {metric} was at step {step}, but {folder.name} is damaged ({wrong}): the"
            " adapter of the last step is kept"
        )
        return
    restore_adapter(folder / "adapter", model)
    restore_reference(folder, model)
    say(f"the best {metric} was at step {step}: that adapter is kept")


def write_adapters(
    run: RunDirectory, model: Model, tokenizer: ChatTokenizer, record: TrainedOn | None
) -> None:
    """Write adapter/, and reference/ where an adapter was the reference, each whole or not at all.

    record: what is written beside them. Raises RunError.
    """

    def fill_adapter(part: Path) -> None:
        save_adapter(model, part)
        tokenizer.save(part)
        if record is not None:
            write_record(record, part)

    def fill_reference(part: Path) -> None:
        save_adapter(model, part, REFERENCE)
        if record is not None:
            write_record(record, part)  # it spoke on this base too

    if model.reference_adapters:
        # With it the run is complete: what it started from may be moved or deleted.
        write_folder(run.reference_folder, fill_reference, manifest=True)
    write_folder(run.adapter_folder, fill_adapter, manifest=True)
