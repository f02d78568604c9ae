"""Proof of an export: what was exported, reloaded from disk, beside base + adapter on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_dpo.errors import ModelError, RunError
from lora_dpo.evaluation import bootstrap
from lora_dpo.export.proof.arithmetic import NoRoom, Plan, device_of, in_float32, plan
from lora_dpo.export.proof.comparing import accuracy_of, compare, margins_of
from lora_dpo.export.proof.report import Kind, OnBase, Pairs, Report, write_report
from lora_dpo.export.proof.rows import Rows, Trained, rows_for
from lora_dpo.export.proof.said import Said, listen, positions_for, spread
from lora_dpo.logprobs import vocabulary
from lora_dpo.model import Model, as_base, load_adapter, load_model, pick_compute_dtype
from lora_dpo.out_of_memory import give_back_memory, is_out_of_memory
from lora_dpo.recipe import Base
from lora_dpo.training import Display

EXAMPLES = 64
"""Held-out examples that are compared."""

INT8 = "on a card int8 layers round their inputs too, a merged model's don't: the comparison includes that"
ROUNDS = (
    "there was no room for float32 arithmetic: in {} a forward pass rounds about as much as small updates"
    " move, so that only coarse errors show"
)


@dataclass(frozen=True)
class Hearing:
    """How every model of a proof is asked: on which examples, where, and by how many tokens at a time."""

    rows: Rows
    plan: Plan
    tokens_per_microbatch: int
    progress: Callable[[int], None]
    say: Callable[[str], None]

    def of(self, model: Model) -> Said:
        return listen(
            model,
            self.rows.examples,
            positions=positions_for(vocabulary(model)),
            tokens_per_microbatch=self.tokens_per_microbatch,
            progress=self.progress,
            say=self.say,
        )

    def ready(self, model: Model) -> Model:
        return in_float32(model) if self.plan.arithmetic == "float32" else model


def prove(
    source: Trained,
    folder: Path,
    *,
    dtype: str,
    kind: Kind = "merged",
    base: Literal["dequantized", "original"] = "dequantized",
    weights: dict[str, Any] | None = None,
    data: str | None = None,
    rows: Rows | str | None = None,
    examples: int = EXAMPLES,
    accept: bool = False,
    display: Display | None = None,
) -> Report:
    """Compare what was exported to a folder with base + adapter, and write `export_report.json` into it.

    dtype: what the weights are stored in. base: whose weights a merge added the update to. weights: what the
    merge measured of the stored weights. data: rows to compare on instead of those that the run held out.
    rows: what `rows_for` gave of them, where they were read before. examples: how many, evenly spread.
    Merged models and adapters are reloaded; the other kinds are not models that can be asked here. Raises
    DataError or RunError where rows that were named can't be used, ModelError where the export can't be
    loaded.
    """
    display = display or Display(quiet=True)
    give_back_memory()  # what a merge kept for reuse is free too
    report = Report(kind, dtype, base, weights, accept=accept)
    rows = rows_for(source, kind, data, examples, display) if rows is None else rows
    made = plan_of(source, folder, kind, dtype, rows) if isinstance(rows, Rows) else rows
    if isinstance(rows, str) or not isinstance(made, Plan):
        report = replace(report, not_compared=made if isinstance(made, str) else made.said)
    else:
        kept = [rows.examples[n] for n in spread(made.examples, len(rows.examples))]
        report = _compared_if_it_fits(report, source, folder, replace(rows, examples=kept), made, display)
    write_report(report, folder)
    return report


def plan_of(source: Trained, folder: Path, kind: Kind, dtype: str, rows: Rows) -> Plan | NoRoom:
    """Where and in what arithmetic to compare."""
    if kind == "adapter":  # the same base twice: nothing that rounding could hide
        return Plan(device_of(source.base).type, compute_dtype(source), len(rows.examples))
    return plan(folder, source.base, dtype, [item.tokens for item in rows.examples])


def compute_dtype(source: Trained) -> str:
    """What the base computed in when it was trained on, and so what its weights are dequantized in."""
    if source.base.compute_dtype != "auto":
        return source.base.compute_dtype
    recorded = getattr(source.record, "compute_dtype", None)
    found = pick_compute_dtype(source.base, device_of(source.base))
    return recorded or str(found).removeprefix("torch.")


def _compared_if_it_fits(
    report: Report, source: Trained, folder: Path, rows: Rows, made: Plan, display: Display
) -> Report:
    """What memory is there was looked up before; somebody else may have taken it since."""
    try:
        return _compared(report, source, folder, rows, made, display)
    except RunError as error:  # a single example does not fit
        return replace(report, not_compared=str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return replace(report, not_compared=f"memory ran out: {error}")


def _compared(
    report: Report, source: Trained, folder: Path, rows: Rows, made: Plan, display: Display
) -> Report:
    speakers = 5 if report.base == "original" else 3
    recipe = source.recipe
    with display.counting("comparing", speakers * len(rows.examples)) as advance:
        hearing = Hearing(
            rows, made, recipe.training.tokens_per_microbatch if recipe else 8192, advance, display.say
        )
        quantized = replace(
            source.base,
            device=made.device,  # pyright: ignore[reportArgumentType]
            compute_dtype=compute_dtype(source),  # pyright: ignore[reportArgumentType]
            fused_kernels=False,
        )
        with _freed():
            trained, base = _both(hearing, quantized, source.adapter)
        with _freed():
            exported = _exported(hearing, report.kind, quantized, folder)
        found = compare(trained, base, exported, rows.examples, rows.records)
        full = made.arithmetic == "float32"
        exact = report.kind == "adapter" or (full and not _rounds_inputs(quantized))
        report = replace(report, pairs=Pairs(rows.source, _arithmetic(made, quantized), found, exact))
        if report.base == "original":
            plain = replace(quantized, quantization="none", compute_dtype=made.arithmetic)  # pyright: ignore
            with _freed():
                wanted, original = _both(hearing, plain, source.adapter)
            stored = compare(wanted, original, exported, rows.examples, rows.records)
            sides = _side_by_side(rows, trained, base, exported, original)
            kept = Pairs(rows.source, made.arithmetic, stored, full)
            report = replace(report, stored=kept, bases=sides)
    return replace(report, notes=_notes(report, quantized, made))


def _arithmetic(made: Plan, base: Base) -> str:
    """Where float32 doesn't fit, base + adapter compute as they were trained."""
    names = ["float32"] if made.arithmetic == "float32" else [base.compute_dtype, made.arithmetic]
    return " against ".join(dict.fromkeys(names))


def _rounds_inputs(base: Base) -> bool:
    """int8 on a card; on a CPU bitsandbytes multiplies with the dequantized weights."""
    return base.quantization == "int8" and base.device != "cpu"


@contextmanager
def _freed() -> Iterator[None]:
    """Give back what the models that were loaded inside took."""
    try:
        yield
    finally:
        give_back_memory()


def _both(hearing: Hearing, base: Base, adapter: Path) -> tuple[Said, Said]:
    """What base + adapter say, and the base alone."""
    model = hearing.ready(load_adapter(load_model(base), str(adapter)))
    said = hearing.of(model)
    with as_base(model):
        return said, hearing.of(model)


def _exported(hearing: Hearing, kind: Kind, base: Base, folder: Path) -> Said:
    if kind == "adapter":
        return hearing.of(hearing.ready(load_adapter(load_model(base), str(folder))))
    plain = Base(
        str(folder),
        quantization="none",
        compute_dtype=hearing.plan.arithmetic,  # pyright: ignore[reportArgumentType]
        device=hearing.plan.device,  # pyright: ignore[reportArgumentType]
        trust_remote_code=base.trust_remote_code,
    )
    try:
        model = load_model(plain)
    except ModelError as error:
        raise ModelError(
            f"the model that was exported to {folder} cannot be loaded again: {error}"
        ) from error
    return hearing.of(model)


def _notes(report: Report, base: Base, made: Plan) -> tuple[str, ...]:
    notes = [made.said] if made.said else []
    if report.kind == "merged" and made.arithmetic != "float32":
        notes.append(ROUNDS.format(made.arithmetic))
    if report.kind == "merged" and _rounds_inputs(base):
        notes.append(INT8)
    return tuple(notes)


def _side_by_side(
    rows: Rows, trained: Said, base: Said, exported: Said, original: Said
) -> tuple[OnBase, OnBase]:
    quantized, plain = "the quantized base", "the original base, not quantized"
    return (
        _on_base("quantized base + adapter, as trained", quantized, rows, trained, base, base),
        _on_base("original base + adapter, as exported", plain, rows, exported, original, base),
    )


def _on_base(name: str, own: str, rows: Rows, said: Said, reference: Said, quantized: Said) -> OnBase:
    margins = margins_of(said, reference, rows.examples, rows.records)
    means = [
        said.sums[:, side].sum().item() / sum(item.scored_count(side) for item in rows.examples)
        for side in range(said.sums.shape[1])
    ]
    return OnBase(
        name=name,
        own_reference=own,
        logps_chosen=means[0],
        logps_rejected=means[1] if len(means) > 1 else None,
        preference_accuracy=accuracy_of(margins) if rows.records == "pairs" else None,
        margin=bootstrap(margins),
        margin_over_quantized=bootstrap(margins_of(said, quantized, rows.examples, rows.records)),
    )
