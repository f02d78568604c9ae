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
    ["training"],
    ["finished"],
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


def test_nothing_is_pickled():
    """No torch.load, no pickle: a checkpoint or data file can't run code."""
    for _, file in modules():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                assert text not in ("torch.load", "torch.save"), f"{file}: {text}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), file
