"""Recipes from scripts and YAML, overrides on top, and the YAML record that replays a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lora_dpo.errors import RecipeError
from lora_dpo.losses import Objective
from lora_dpo.recipe.coerce import (
    build,
    coerce,
    describe,
    field_names,
    hints_of,
    parse_objective,
    unknown_key,
)
from lora_dpo.recipe.own import objective_name, run_script
from lora_dpo.recipe.rounds import IterativeRecipe
from lora_dpo.recipe.schema import Recipe, Source
from lora_dpo.recipe.yaml_text import parse_yaml


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a `.py` file (its variable `recipe`) or a `.yaml` file, with `key=value` overrides.

    Raises RecipeError where the file or a key is wrong. A `.py` file is run, so it is as trusted as any
    script. A `.yaml` file holds plain values, with two that run code: read what it says under
    base.trust_remote_code, and under loss.objective where that is no name but "file.py:Class".
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"no recipe file {file}")
    if file.suffix == ".py":
        made = run_script(file).get("recipe")
        if not isinstance(made, Recipe):
            raise RecipeError(f"{file} does not set a variable `recipe` to a lora_dpo.Recipe")
        return override(made, overrides)
    if file.suffix in (".yaml", ".yml"):
        return override(from_dict(_read_yaml(file)), overrides)
    raise RecipeError(f"{file}: a recipe is a .py or a .yaml file")


def _read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise RecipeError(f"{file} holds no mapping of keys such as base, data and training")
    return values


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested mappings, as `to_dict` makes them; a loop's where they have its sections."""
    return build(IterativeRecipe if "rounds" in values else Recipe, values, "")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested mappings of plain values; `from_dict` gives the recipe back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Objective):
            return {"objective": objective_name(type(value)), **fields(value)}
        if dataclasses.is_dataclass(value):
            return fields(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        return f"<{type(value).__name__} of {len(value)} rows given from Python>"

    def fields(value: Any) -> dict[str, Any]:
        return {name: plain(getattr(value, name)) for name in field_names(type(value))}

    return fields(recipe)


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=110)


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute and a template's file replaced by its text.

    So that it means the same from another working folder, and after the template's file was edited.
    """
    data, template = recipe.data, recipe.data.chat_template
    if template is not None and os.path.isfile(os.path.expanduser(template)):
        template = Path(template).expanduser().read_text(encoding="utf-8")
    data = replace(data, train=_absolute(data.train), eval=_absolute(data.eval), chat_template=template)
    if isinstance(recipe, IterativeRecipe):
        judge = replace(recipe.judge, of=_absolute_judge(recipe.judge.of))
        second = recipe.rounds.held_out_judge
        rounds = replace(recipe.rounds, held_out_judge=second and _absolute_judge(second))
        recipe = replace(recipe, judge=judge, rounds=rounds)
    return replace(
        recipe,
        base=replace(recipe.base, model=_absolute(recipe.base.model)),
        data=data,
        adapter=replace(recipe.adapter, start_from=_absolute(recipe.adapter.start_from)),
        reference=replace(recipe.reference, adapter=_absolute(recipe.reference.adapter)),
    )


def _absolute_judge(text: str) -> str:
    """The folder or file of a judge made absolute; see `Judge.of`."""
    kind, _, place = text.partition(":")
    file, colon, name = place.rpartition(":")
    if kind == "function" and colon:
        return f"{kind}:{_absolute(file)}:{name}"
    return f"{kind}:{_absolute(place)}" if place else text


def _absolute(value: Any) -> Any:
    """Paths of files and folders that are there made absolute, in a source or several; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(_absolute(item) for item in value)
    if isinstance(value, Source):
        return replace(value, path=_absolute(value.path))
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value)
    if os.path.exists(path):  # unlike Path.exists, False for what can't be a path at all
        return os.path.abspath(path)
    folder, colon, split = value.rpartition(":")  # a folder may name a split
    return f"{os.path.abspath(folder)}:{split}" if colon and os.path.isdir(folder) else value


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` texts applied, all at once, so that no in-between recipe is checked."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip().lstrip("-")
        if not equals:
            raise RecipeError(f"{text!r} is no override: write key=value, such as loss.beta=0.05")
        _check_known(recipe, key)
        values[key] = value
    return _replaced(recipe, values) if values else recipe


def _replaced(recipe: Recipe, values: Mapping[str, str]) -> Recipe:
    changes: dict[str, Any] = {}
    for name in {key.partition(".")[0] for key in values}:
        section = getattr(recipe, name)
        if name in values:
            # A whole section at once: `loss=SFT`, `run_directory=…`; keys below it then apply to that.
            section = coerce(hints_of(type(recipe))[name], values[name], name)
        below = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(name + ".")}
        if name == "loss":
            changes[name] = _changed(section, below, "loss")
        else:
            hints = hints_of(type(section)) if below else {}
            parsed = {k: coerce(hints[k], v, f"{name}.{k}") for k, v in below.items()}
            changes[name] = dataclasses.replace(section, **parsed) if below else section
    return dataclasses.replace(recipe, **changes)


def _changed(objective: Objective, below: Mapping[str, str], key: str) -> Objective:
    """The objective with fields changed; a dot leads into the objective that it is around: `of.beta`."""
    if not below:
        return objective
    values = {k: getattr(objective, k) for k in field_names(type(objective))}
    values |= {k: v for k, v in below.items() if "." not in k}
    for name in {k.partition(".")[0] for k in below if "." in k}:
        deeper = {k.partition(".")[2]: v for k, v in below.items() if k.startswith(name + ".")}
        if not isinstance(getattr(objective, name, None), Objective):
            raise unknown_key(f"{key}.{name}.{next(iter(deeper))}", [f"{key}.{k}" for k in values])
        values[name] = _changed(parse_objective(values[name], f"{key}.{name}"), deeper, f"{key}.{name}")
    return parse_objective({"objective": objective_name(type(objective)), **values}, key)


def _check_known(recipe: Recipe, key: str) -> None:
    known = [name for name, _, _ in keys_of(recipe)]
    sections = field_names(type(recipe))
    if key not in known and key not in sections and not key.startswith("loss."):
        raise unknown_key(key, known)


def keys_of(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Every key that an override can name: (dotted key, what it takes, its value in this recipe)."""
    rows: list[tuple[str, str, str]] = []
    for name, hint in hints_of(type(recipe)).items():
        if name == "section":
            continue
        value = getattr(recipe, name)
        if not dataclasses.is_dataclass(value):
            rows.append((name, describe(hint), str(value)))
            continue
        if name == "loss":
            rows.append((name, describe(hint), type(value).__name__))
        inner = hints_of(type(value))
        rows += [
            (f"{name}.{field}", describe(inner[field]), _shown(getattr(value, field)))
            for field in field_names(type(value))
        ]
    return rows


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
