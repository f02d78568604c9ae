"""Imports run one way, the command line starts at once, and nothing is pickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lora_dpo

PACKAGE = Path(lora_dpo.__file__).parent
LAYERS = [
    ["bounds", "errors", "out_of_memory", "stopping"],
    ["losses"],
    ["recipe"],
    ["preferences", "run_directory"],
    ["tokenization"],
    ["batching"],
    ["attention"],
    ["ways"],
    ["probe"],
    ["model"],
    ["logprobs"],
    ["reference"],
    ["sampling"],
    ["evaluation"],
    ["shift"],
    ["training"],
    ["finished"],
    ["answering"],
    ["export"],
    ["quickstart"],
    ["cli"],
]
LAYER_OF = {name: n for n, names in enumerate(LAYERS) for name in names}


def modules() -> list[tuple[str, Path]]:
    files = [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py"]
    return [(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file) for file in files]


def imports(file: Path) -> set[str]:
    """The lora_dpo modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lora_dpo.")}
    return found


def test_every_module_has_a_layer_and_imports_only_from_below():
    for name, file in modules():
        assert name in LAYER_OF, f"{name} stands in no layer"
        for other in imports(file) - {name}:
            assert LAYER_OF[other] < LAYER_OF[name], f"{file.name} ({name}) imports {other}"


def test_the_command_line_starts_without_the_heavy_libraries():
    code = (
        "import sys, lora_dpo.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'bitsandbytes', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in lora_dpo.__all__:
        assert getattr(lora_dpo, name) is not None
    assert sorted(lora_dpo.__all__) == sorted(lora_dpo._MODULE_OF)


FORBIDDEN = {
    "pickle": "runs code when read",
    "cPickle": "runs code when read",
    "dill": "runs code when read",
    "cloudpickle": "runs code when read",
    "joblib": "runs code when read",
    "marshal": "runs code when read",
    "shelve": "runs code when read",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "torch.hub": "downloads code",
    "numpy.load": "may unpickle",
    "np.load": "may unpickle",
    "yaml.load": "makes Python objects; safe_load doesn't",
    "yaml.full_load": "makes Python objects",
    "yaml.unsafe_load": "makes Python objects",
    "eval": "runs text",
    "exec": "runs text",
    "compile": "compiles text",
    "__import__": "imports what text names",
    "importlib.import_module": "imports what text names",
    "import_module": "imports what text names",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "kernels": "downloads code and runs it",
}
EXCEPTIONS = {
    ("recipe/own.py", "compile"): "a recipe script, which the user named on the command line",
    ("recipe/own.py", "exec"): "the same",
    ("recipe/own.py", "importlib.import_module"): "an objective that the recipe names: module:Class",
    ("__init__.py", "import_module"): "the package's own modules, on first use",
    ("__init__.py", "importlib.import_module"): "the same",
}


def uses(file: Path) -> set[str]:
    """Names of FORBIDDEN that a file imports, calls or reads, and calls with telling arguments."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            found |= {name for name in names if name in FORBIDDEN}
            found |= {name.split(".")[0] for name in names if name.split(".")[0] in FORBIDDEN}
        elif isinstance(node, ast.Attribute):
            found |= {ast.unparse(node)} & FORBIDDEN.keys()
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & FORBIDDEN.keys()
            told = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
            found |= {
                f"{name}={told[name]}"
                for name, harmless in (
                    ("allow_pickle", "False"),
                    ("shell", "False"),
                    ("weights_only", "True"),
                )
                if told.get(name, harmless) != harmless
            }
    return found


def test_nothing_is_pickled_and_no_text_is_run():
    """No checkpoint, model, data file or adapter can run code; the exceptions are the user's own scripts."""
    recipes = PACKAGE.parent / "recipes"
    files = [(f.relative_to(PACKAGE).as_posix(), f) for f in PACKAGE.rglob("*.py")]
    files += [(f"recipes/{f.name}", f) for f in recipes.glob("*.py")]
    assert len(files) > 80
    found = {(name, use) for name, file in files for use in uses(file)}
    assert found == set(EXCEPTIONS)


def test_the_search_for_pickles_finds_them(tmp_path: Path):
    file = tmp_path / "bad.py"
    file.write_text(
        "import pickle\nfrom torch import load, save\nimport numpy as np\nfrom os import system\n"
        "np.load('x', allow_pickle=True)\neval('1')\nimport subprocess\n"
        "subprocess.run('ls', shell=True)\nfrom pickle import loads\n"
    )
    there = {"pickle", "torch.load", "torch.save", "np.load", "allow_pickle=True", "eval", "shell=True"}
    assert uses(file) == there | {"os.system"}
