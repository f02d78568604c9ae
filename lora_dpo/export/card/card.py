"""The README of an exported folder, a model card in Hugging Face's form.

It says what is known and no more: where a file is missing its facts are left out, or said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_dpo import __version__
from lora_dpo.export.card.curves import draw_curves
from lora_dpo.export.card.facts import Facts, Kind, gather, text_of
from lora_dpo.export.card.limits import limitations
from lora_dpo.export.card.markdown import code, plain
from lora_dpo.export.card.names import hub_dataset, last_part, sources_of, without_tokens
from lora_dpo.export.card.results import headline, measured, proof
from lora_dpo.export.card.training import base_link, called, objective, trained_from, trained_on
from lora_dpo.export.card.usage import usage
from lora_dpo.losses import OBJECTIVES
from lora_dpo.run_directory import write_text

if TYPE_CHECKING:
    from lora_dpo.export.source import Source

PICTURE = "curves.png"
WHAT = {
    "adapter": "LoRA adapter",
    "merged": "merged model",
    "gguf": "GGUF",
    "gguf-adapter": "LoRA adapter as GGUF",
    "ollama": "Ollama model",
}


def write_card(
    folder: Path,
    source: Source,
    report: Mapping[str, Any] | None,
    kind: Kind,
    *,
    repository: str | None = None,
) -> None:
    """Write README.md, and curves.png where the run has metrics, into an exported folder.

    report: what export_report.json says; None where nothing was compared. repository: the hub's name of the
    folder, where it will be pushed. Raises RunError where the files can't be written.
    """
    facts = gather(folder, source, report, kind, repository)
    picture = PICTURE if draw_curves(facts.records, folder / PICTURE) else None
    write_text(folder / "README.md", card(facts, picture))


def card(facts: Facts, picture: str | None = None) -> str:
    """The whole text. picture: the file with the curves beside it."""
    head = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=False, width=10_000)
    parts = [
        f"# {plain(_title(facts))}",
        _opening(facts),
        trained_from(facts),
        trained_on(facts),
        objective(facts),
        measured(facts, picture),
        proof(facts),
        usage(facts),
        _licence(facts),
        limitations(facts),
        _version(facts),
    ]
    text = f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    return without_tokens(text)


def front_matter(facts: Facts) -> dict[str, Any]:
    """The card's metadata: what the hub shows, filters and links by."""
    values: dict[str, Any] = {}
    if facts.base_id is not None:
        values["base_model"] = facts.base_id
        values["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if facts.kind in ("adapter", "merged"):
        values["library_name"] = "peft" if facts.kind == "adapter" else "transformers"
    values["pipeline_tag"] = "text-classification" if facts.is_reward else "text-generation"
    values |= facts.licence.metadata()
    values["tags"] = _tags(facts)
    if facts.recipe is not None:
        found = (hub_dataset(source) for source in sources_of(facts.recipe.data.train))
        datasets = list(dict.fromkeys(name for name in found if name is not None))
        values |= {"datasets": datasets} if datasets else {}
    return values


def _tags(facts: Facts) -> list[str]:
    tags = ["lora_dpo", "lora", *(["reward-model"] if facts.is_reward else [])]
    if facts.recipe is not None:
        name = type(facts.recipe.loss).__name__
        tags += [name.lower()] if OBJECTIVES.get(name) is type(facts.recipe.loss) else []
    return tags + (["gguf"] if facts.kind in ("gguf", "gguf-adapter") else [])


def _title(facts: Facts) -> str:
    how = "" if facts.recipe is None else f"{type(facts.recipe.loss).__name__}, "
    what = "reward model" if facts.is_reward else WHAT[facts.kind]
    return f"{last_part(facts.base_name)}: {how}{what}"


def _opening(facts: Facts) -> str:
    base = base_link(facts)
    what = {
        "adapter": f"A LoRA adapter for {base}",
        "merged": f"{base} with a LoRA adapter merged into its weights",
        "gguf": f"{base} with a LoRA adapter merged into its weights, as GGUF",
        "gguf-adapter": f"A LoRA adapter for {base}, as GGUF",
        "ollama": f"{base} with a LoRA adapter, for Ollama",
    }[facts.kind]
    if facts.is_reward:
        what = f"A reward model: a LoRA adapter with a scalar head for {base}"
    if facts.recipe is None:
        return f"{what}. It was exported from an adapter alone: what that was trained on is not recorded."
    said = f"{what}, trained with {called(facts.recipe.loss)} by lora_dpo on {_rows_in_words(facts)}."
    return " ".join([said, *headline(facts)])


def _rows_in_words(facts: Facts) -> str:
    assert facts.recipe is not None
    records = facts.recipe.loss.records
    return records if facts.examples is None else f"{facts.examples[0]:,} {records}"


def _licence(facts: Facts) -> str:
    licence = facts.licence
    if licence.identifier is None:
        said = (
            f"Unknown: no file of {base_link(facts)} that was at hand names it. Look it up before you share"
            " this model."
        )
    else:
        named = f" ({code(licence.name)})" if licence.name else ""
        at = f", <{licence.link}>" if licence.link else ""
        said = f"The base's README gives its licence as {code(licence.identifier)}{named}{at}."
    if licence.files:
        said += f" Beside it: {', '.join(code(name) for name in licence.files)}."
    return f"## Licence of the base\n\n{said}"


def _version(facts: Facts) -> str:
    trained = text_of(facts.trained_on.get("lora_dpo"))
    by = f"Trained with lora_dpo {code(trained)}, exported" if trained else "Exported"
    return f"---\n\n{by} with lora_dpo {code(__version__)}, which wrote this card."
