"""What was measured, as a card shows it: the run's evaluation, and how the export compares with what was
trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_dpo.export.card.facts import Facts, mapping_of, number_of, text_of
from lora_dpo.export.card.markdown import bullets, code, details, plain, table
from lora_dpo.export.card.names import last_part, public_text

NOT_FINITE = "not a number"
WORST = 10
"""So many layers are shown, those that kept least of their update."""

MEANINGS = {
    "rewards/accuracy": (
        "preference accuracy",
        "share of pairs with the higher implicit reward on the chosen",
    ),
    "rewards/margin": ("margin", "implicit reward of the chosen response less that of the rejected one"),
    "loss": ("loss", "of the objective"),
    "rewards/chosen": ("reward, chosen", "implicit reward"),
    "rewards/rejected": ("reward, rejected", "implicit reward"),
    "logps/chosen_change": ("change, chosen", "log-probability against the reference, nats a response"),
    "logps/rejected_change": ("change, rejected", "log-probability against the reference, nats a response"),
    "logps/chosen": ("log-probability, chosen", "nats a response"),
    "logps/rejected": ("log-probability, rejected", "nats a response"),
    "logps/accuracy": ("likelihood accuracy", "share of pairs whose chosen response is the likelier one"),
    "logps/response": ("log-probability", "nats a response"),
    "logps/completion": ("log-probability", "nats a response"),
    "tokens/chosen": ("length, chosen", "scored tokens"),
    "tokens/rejected": ("length, rejected", "scored tokens"),
    "tokens/response": ("length", "scored tokens"),
    "tokens/completion": ("length", "scored tokens"),
}
"""Metrics in the order that a card shows them: what they are called, and what they are."""


def measured(facts: Facts, picture: str | None) -> str:
    """The section about held-out results. picture: the file with the curves, beside the card."""
    parts = ["## Measured results", *_evaluated(facts)]
    if picture is not None:
        curves = "Curves of loss, preference accuracy, margin and log-probabilities over the optimizer steps"
        parts.append(f"![{curves}]({picture})")
    return "\n\n".join(parts)


def headline(facts: Facts) -> list[str]:
    """The first figure that anybody looks for, in a sentence; none where it wasn't measured."""
    metrics = mapping_of(None if facts.evaluation is None else facts.evaluation.get("metrics"))
    accuracy = mapping_of(metrics.get("rewards/accuracy"))
    if not facts.on_own_rows or number_of(accuracy.get("mean")) is None:
        return []
    examples = mapping_of(facts.evaluation)["examples"]
    return [f"Its preference accuracy on {examples:,} held-out pairs is {with_interval(accuracy)}."]


def _evaluated(facts: Facts) -> list[str]:
    rows = "examples" if facts.recipe is None else facts.recipe.loss.records
    if facts.evaluation is not None:
        examples = facts.evaluation.get("examples")
        number = f"{examples:,}" if isinstance(examples, int) else "an unknown number of"
        said = f"On {number} {rows}{_whose(facts)}. Means with 95% bootstrap intervals over them."
        metrics = mapping_of(facts.evaluation.get("metrics"))
        return [said, _metrics_table(facts, {name: interval_text(value) for name, value in metrics.items()})]
    record = facts.kept_evaluation
    if record is not None:
        said = (
            f"On the {rows} that the run held out, after step {record['step']}. Means without intervals:"
            " `lora-dpo eval` had not been run when this card was written."
        )
        means = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
        return [said, _metrics_table(facts, {name: (digits(value), "") for name, value in means.items()})]
    return ["Nothing was measured on held-out examples, or it was not recorded where this card was written."]


def _whose(facts: Facts) -> str:
    """Which rows evaluation.json is of, in words."""
    if facts.on_own_rows:
        return " that the run held out"
    source = text_of(mapping_of(facts.evaluation).get("source"))
    if source is not None:
        return f" of {code(public_text(last_part(source)))}, not of those that the run held out"
    return ", of which isn't recorded where they are from: they may be others than the run held out"


def _metrics_table(facts: Facts, found: Mapping[str, tuple[str, str]]) -> str:
    names = [name for name in MEANINGS if name in found] + sorted(found.keys() - MEANINGS.keys())
    rows = []
    for name in names:
        title, meaning = MEANINGS.get(name, (code(name), ""))
        meaning = meaning.replace("implicit ", "") if facts.is_reward else meaning
        rows.append([title, *found[name], meaning])
    intervals = any(interval for _, interval in found.values())
    if not intervals:
        return table(("metric", "mean", "what it is"), [[row[0], row[1], row[3]] for row in rows])
    return table(("metric", "mean", "95% interval", "what it is"), rows)


def digits(value: Any) -> str:
    """A number with three decimals, as `lora-dpo eval` prints it."""
    number = number_of(value)
    return NOT_FINITE if number is None else f"{number:.3f}"


def short(value: Any) -> str:
    """A number with four significant digits."""
    number = number_of(value)
    return NOT_FINITE if number is None else f"{number:.4g}"


def interval_text(value: Any) -> tuple[str, str]:
    """(mean, 95% interval) of {"mean", "low", "high"}; a plain number has none."""
    if not isinstance(value, Mapping):
        return digits(value), ""
    low, high = (number_of(value.get(end)) for end in ("low", "high"))
    return digits(value.get("mean")), "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def with_interval(value: Any) -> str:
    return " ".join(text for text in interval_text(value) if text)


def proof(facts: Facts) -> str:
    """The section about what the export kept."""
    report = facts.report
    parts = ["## What the export kept"]
    if report is None:
        copied = "The adapter's tensors are those of the training run. " if facts.kind == "adapter" else ""
        return "\n\n".join([*parts, f"{copied}This export was not compared with base + adapter."])
    parts += [_stored(facts, report), *_verdict(report)]
    weights = mapping_of(report.get("weights"))
    parts += [_weights(weights)] if weights else []
    for key, name in (("pairs", "base + adapter"), ("stored", "the original base + adapter")):
        pairs = mapping_of(report.get(key))
        parts += _pairs(pairs, name) if pairs else []
    if mapping_of(report.get("pairs")):
        parts += _other_figures(facts)
    parts += _bases(_list(report.get("bases")))
    parts.append(bullets([plain(public_text(str(note))) for note in _list(report.get("notes"))]))
    return "\n\n".join(part for part in parts if part)


def _stored(facts: Facts, report: Mapping[str, Any]) -> str:
    dtype = text_of(report.get("dtype"))
    stored = f"Weights are stored in {code(dtype)}. " if dtype else ""
    if facts.is_adapter:
        return stored.strip()
    if report.get("base") == "original":
        return (
            f"{stored}The update was added to the **original** base, not to the quantized one that it was"
            " trained on: this is a different function from the one that was trained."
        )
    if report.get("base") == "dequantized" and facts.quantization != "none":
        return (
            f"{stored}The update was added to the base as it was while training: quantized"
            f" ({code(facts.quantization)}) and then dequantized."
        )
    return stored.strip()


def _verdict(report: Mapping[str, Any]) -> list[str]:
    """Whether the bars were met, in words."""
    bars = [f"{code(name)} {short(value)}" for name, value in mapping_of(report.get("bars")).items()]
    asked = f" ({', '.join(bars)})" if bars else ""
    failed = [plain(public_text(str(reason))) for reason in _list(report.get("failed"))]
    said = []
    if report.get("passed") is False or failed:
        said += [f"**The export misses its bars**{asked}:", bullets(failed)]
        if report.get("accepted") is True:
            said.append("It was written all the same, because its author accepted that (`--accept`).")
    elif report.get("passed") is True:
        said.append(f"The export meets its bars{asked}.")
    if report.get("pairs") is None:
        why = text_of(report.get("not_compared"))
        because = f": {plain(public_text(why))}" if why else ""
        said.append(f"**Nothing could be compared** with base + adapter on held-out rows{because}.")
    return said


def _weights(weights: Mapping[str, Any]) -> str:
    """The share of the update that is left in the stored weights, in all and where it is least."""
    if "kept" in weights and weights["kept"] is None:
        return "The adapter changes no weight: its update is 0."
    found = [layer for layer in _list(weights.get("layers")) if isinstance(layer, Mapping)]
    layers = [layer for layer in found if layer.get("kept") is not None]  # the others have no update to keep
    said = (
        f"In the weights, {short(weights.get('kept'))} of the update is kept over all changed tensors, and"
        f" what is stored differs from what was wanted by {short(weights.get('error'))} of the update's norm."
    )
    if not layers:
        return said
    least = sorted(layers, key=lambda layer: number_of(layer.get("kept")) or 0.0)[:WORST]
    rows = [
        [code(layer.get("name", "")), *(short(layer.get(key)) for key in ("update", "kept", "error"))]
        for layer in least
    ]
    title = (
        "Layer by layer" if len(layers) <= WORST else f"The {WORST} of {len(layers)} layers that kept least"
    )
    header = ("layer", "update / weight (norms)", "kept", "error / update (norms)")
    return f"{said}\n\n{details(title, table(header, rows))}"


def _pairs(pairs: Mapping[str, Any], name: str) -> list[str]:
    """What was trained beside what was exported, on held-out rows. name: of the former."""
    where = text_of(pairs.get("source"))
    on = f" of {code(public_text(last_part(where)))}" if where else ""
    count = ", ".join(
        f"{number:,.0f} {what}"
        for key, what in (("examples", "examples"), ("tokens", "scored tokens"), ("positions", "positions"))
        if (number := number_of(pairs.get(key))) is not None
    )
    arithmetic = text_of(pairs.get("arithmetic"))
    how = f", computed in {code(arithmetic)}" if arithmetic else ""
    margin, accuracy = mapping_of(pairs.get("margin")), mapping_of(pairs.get("preference_accuracy"))
    both = [
        (title, with_interval(found.get("trained")), with_interval(found.get("exported")))
        for title, found in (("preference accuracy", accuracy), ("margin, in nats, without β", margin))
        if found
    ]
    rows = _differences(pairs, name)
    parts = [f"Reloaded from disk and compared with {name} on held-out rows{on}: {count}{how}."]
    parts += [table((f"export against {name}", "mean", "largest"), rows)] if rows else []
    return parts + ([table(("mean [95% interval]", name, "as exported"), both)] if both else [])


def _other_figures(facts: Facts) -> list[str]:
    """Why these figures aren't those of the run's own evaluation, where the card has both."""
    metrics = mapping_of(None if facts.evaluation is None else facts.evaluation.get("metrics"))
    if "rewards/margin" not in metrics and "eval/rewards/margin" not in (facts.kept_evaluation or {}):
        return []
    beta = None if facts.recipe is None else number_of(getattr(facts.recipe.loss, "beta", None))
    included = "" if beta is None else f", β = {beta:g} included"
    return [
        "These are not the figures under Measured results: there the margin is that of the objective's"
        f" implicit rewards{included}, computed as in training; here it is without β, on the rows and in the"
        " arithmetic that are named here."
    ]


def _differences(pairs: Mapping[str, Any], name: str) -> list[Sequence[str]]:
    """Rows of a table: what, mean, largest."""
    rows: list[Sequence[str]] = [
        (title, *(short(found[which]) for which in ("mean", "largest")))
        for key, title in (
            ("logprob_difference", "log-probability of a token, absolute difference in nats"),
            ("kl", f"KL({name} ‖ export) at a position, in nats"),
        )
        if (found := mapping_of(pairs.get(key))).keys() >= {"mean", "largest"}
    ]
    moved = mapping_of(pairs.get("kl")).get("trained_from_base")
    if moved is not None:
        rows.append(("beside it KL(base + adapter ‖ base), as far as training moved it", short(moved), ""))
    if pairs.get("top1_agreement") is not None:
        rows.append(("same likeliest token, share of positions", short(pairs["top1_agreement"]), ""))
    margin = mapping_of(pairs.get("margin"))
    if margin.get("kept") is not None:
        ends = [number_of(mapping_of(margin.get("kept_interval")).get(end)) for end in ("low", "high")]
        interval = "" if None in ends else f" [{short(ends[0])}, {short(ends[1])}]"
        rows.append(("**margin kept**, share", f"**{short(margin['kept'])}**{interval}", ""))
    return rows


def _bases(bases: Sequence[Any]) -> list[str]:
    """The bases with the adapter beside each other, for an export onto the original one."""
    columns = {
        "own_reference": "reference",
        "logps_chosen": "log-prob a token, chosen",
        "logps_rejected": "rejected",
        "preference_accuracy": "preference accuracy",
        "margin": "margin, without β",
        "margin_over_quantized": "margin over the quantized base",
    }
    found = [mapping_of(base) for base in bases]
    shown = [key for key in columns if any(base.get(key) is not None for base in found)]
    if not found:
        return []
    rows = [[code(base.get("name", "")), *(_cell(base.get(key)) for key in shown)] for base in found]
    header = ("model", *(columns[key] for key in shown))
    return ["Both bases with the adapter, beside each other:", table(header, rows)]


def _cell(value: Any) -> str:
    """A figure, with its interval where it has one, or words."""
    return "" if value is None else code(value) if isinstance(value, str) else with_interval(value)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()
