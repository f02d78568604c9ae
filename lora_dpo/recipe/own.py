"""A user's own objective or function: where it is, and back."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from lora_dpo.errors import RecipeError
from lora_dpo.losses import OBJECTIVES, Objective


def objective_name(kind: type[Objective]) -> str:
    """What `recipe.yaml` calls a class: its name, or "module:Class", or "/path/to/file.py:Class" for one that
    no module of that name would give back, such as a class in a recipe script.
    """
    if OBJECTIVES.get(kind.__name__) is kind:
        return kind.__name__
    module = sys.modules.get(kind.__module__)
    importable = module is not None and module.__spec__ is not None and kind.__module__ != "__main__"
    if importable and getattr(module, kind.__qualname__, None) is kind:
        return f"{kind.__module__}:{kind.__qualname__}"
    return f"{os.path.abspath(kind.defined_in)}:{kind.__qualname__}"


def import_objective(name: str, key: str) -> type[Objective]:
    """The class of such a name; its file is run, so it is as trusted as any script. Raises RecipeError."""
    place, _, attribute = name.rpartition(":")
    found = _named(name, key)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        what = "no such class" if found is None else "no lora_dpo.Objective"
        raise RecipeError(f"{key} got {name!r}: {place} has {what} {attribute}")
    if "__dataclass_fields__" not in vars(found):
        raise RecipeError(f"{key} got {name!r}: put @dataclass(frozen=True) above class {attribute}")
    return found


def import_function(name: str, key: str) -> Callable[..., Any]:
    """What "file.py:name" or "module:name" calls, a function; as trusted as a script. Raises RecipeError."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise RecipeError(f"{key} got {name!r}; it takes FILE.py:NAME or module:NAME")
    found = _named(name, key)
    if not callable(found):
        what = "no" if found is None else "something else than a function under"
        raise RecipeError(f"{key} got {name!r}: {place} has {what} {attribute}")
    return found


def _named(name: str, key: str) -> Any:
    """The variable of a script or module; None where it has none of that name. Raises RecipeError."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            return run_script(Path(place).expanduser()).get(attribute)
        return getattr(importlib.import_module(place), attribute, None)
    except RecipeError as error:
        raise RecipeError(f"{key} got {name!r}: {error}") from error
    except Exception as error:  # whatever the user's own code raises
        raise RecipeError(f"{key} got {name!r}: {type(error).__name__}: {error}") from error


def run_script(file: Path) -> dict[str, Any]:
    """The script's variables; it may import files beside it, as it could if python ran it.

    Raises RecipeError where it is no Python; what it raises itself goes through.
    """
    path = file.absolute()
    # It stays known as a module: annotations that are text are looked up there.
    module = types.ModuleType(f"recipe_{xxhash.xxh3_64_hexdigest(str(path).encode())}")
    module.__file__ = str(path)
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RecipeError(f"{file}{line}: {getattr(error, 'msg', error)}") from None
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent))
    try:
        exec(code, module.__dict__)
    finally:
        sys.path.pop(0)
    return module.__dict__
