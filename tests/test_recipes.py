"""Every recipe in recipes/: it builds, says what it is, keeps its word on memory, and trains."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import pair_rows
from safetensors.torch import load_file

from lora_dpo.recipe import Recipe, override, to_dict, to_yaml
from lora_dpo.recipe.files import from_dict, load_recipe
from lora_dpo.training import Record, train

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PLAIN_LOOP = FOLDER / "plain_loop.py"
# Those that make their own base and data have tests of their own.
OFFLINE = ("quickstart.py", "iterative_dpo.py")
FILES = sorted(file for file in FOLDER.glob("*.py") if file.name not in (PLAIN_LOOP.name, *OFFLINE))
every_recipe = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@dataclass(frozen=True)
class Shape:
    """A Llama-like model's sizes, from its public config. heads, key_value: widths of q, and of k and v."""

    layers: int
    width: int
    heads: int
    key_value: int
    hidden: int
    vocabulary: int
    tied: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's q, k, v, o, gate, up and down."""
        d, f = self.width, self.hidden
        attention = [(d, self.heads), (d, self.key_value), (d, self.key_value), (self.heads, d)]
        return [*attention, (d, f), (d, f), (f, d)]


MISTRAL_7B = Shape(32, 4096, 4096, 1024, 14336, 32000)
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(30, 576, 576, 192, 1536, 49152, tied=True),
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(24, 896, 896, 128, 4864, 151936, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": Shape(36, 2048, 2048, 256, 11008, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": Shape(28, 3584, 3584, 512, 18944, 152064),
    "Qwen/Qwen2.5-14B-Instruct": Shape(48, 5120, 5120, 1024, 13824, 152064),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(28, 3072, 3072, 1024, 8192, 128256, tied=True),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 4096, 1024, 14336, 128256),
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(32, 4096, 4096, 1024, 14336, 32768),
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B,
}


def estimated_gib(recipe: Recipe) -> float:
    """The formula of recipes/README.md."""
    shape, training, adapter = SHAPES[recipe.base.model], recipe.training, recipe.adapter
    assert recipe.base.quantization == "nf4"
    assert training.gradient_checkpointing != "none"
    tokens, layers, d, f = training.tokens_per_microbatch, shape.layers, shape.width, shape.hidden
    weights = 0.516 * layers * sum(i * o for i, o in shape.linears)
    embeddings = 2 * shape.vocabulary * d * (1 if shape.tied else 2)
    parameters = adapter.rank * layers * sum(i + o for i, o in shape.linears)
    adapters = (12 if training.optimizer.endswith("8bit") else 18) * parameters
    kept = 2 * tokens * layers * d
    layer = tokens * (32 * d + 12 * f)
    dropout = 3 * tokens * (6 * d + f) if adapter.dropout else 0
    return (weights + embeddings + adapters + kept + layer + dropout) / 2**30 + 1.5


def card_of(file: Path) -> str:
    """What the file's name says it runs on: "8 GB", or "CPU"."""
    size = re.fullmatch(r".*_(\d+)gb", file.stem)
    assert size or file.stem.endswith("_cpu"), "a recipe's name ends with its card"
    return f"{size[1]} GB" if size else "CPU"


def docstring_of(file: Path) -> str:
    return runpy.run_path(str(file), run_name="recipe")["__doc__"]


def readme_row(file: Path) -> str:
    rows = [line for line in README.splitlines() if line.startswith(f"| [{file.name}]({file.name}) |")]
    assert len(rows) == 1, f"recipes/README.md has one row for {file.name}"
    return rows[0]


def test_there_is_a_recipe_for_every_size_of_card():
    assert {card_of(file) for file in FILES} >= {"CPU", "8 GB", "12 GB", "16 GB", "24 GB"}


@every_recipe
def test_a_recipe_survives_its_yaml_record(file: Path, tmp_path: Path):
    recipe = load_recipe(file)
    assert from_dict(to_dict(recipe)) == recipe
    record = tmp_path / "recipe.yaml"
    record.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(record) == recipe


@every_recipe
def test_name_docstring_and_table_agree(file: Path):
    recipe, text, row = load_recipe(file), docstring_of(file), readme_row(file)
    summary = text.strip().splitlines()[0]
    model = recipe.base.model.partition("/")[2]
    assert card_of(file) in summary
    assert f"Card: {'none, the CPU' if card_of(file) == 'CPU' else card_of(file)}" in text
    assert f"| {card_of(file)} |" in row
    assert f"`{recipe.base.model}`" in row
    assert model.removesuffix("-v0.1").removesuffix("-sft-full").lower() in text.lower()
    assert recipe.run_directory == f"runs/{file.stem}"
    assert f"run(recipe)  # python recipes/{file.name} " in file.read_text(encoding="utf-8")


@every_recipe
def test_the_memory_a_recipe_names_is_what_the_formula_gives_and_fits_its_card(file: Path):
    recipe, text = load_recipe(file), docstring_of(file)
    named = re.search(r"Memory: about ([\d.]+) GiB, estimated by the formula in recipes/README\.md", text)
    assert named
    assert "not yet measured" in text
    assert float(named[1]) == round(estimated_gib(recipe), 1)
    assert f"| {named[1]} |" in readme_row(file)
    card = card_of(file)
    if card != "CPU":
        # What the desktop and fragmentation take is not in the formula: an eighth is left free.
        assert float(named[1]) <= 7 / 8 * int(card.removesuffix(" GB"))
    # A pair longer than the budget would get a micro-batch of its own, larger than was reckoned with.
    assert len(recipe.loss.sides) * recipe.data.max_tokens <= recipe.training.tokens_per_microbatch


@every_recipe
def test_the_script_answers_help_and_loading_writes_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    before = sorted(FOLDER.iterdir())
    load_recipe(file)
    assert capsys.readouterr().out == ""
    runpy.run_path(str(file), run_name="__main__")
    assert f"base.model={load_recipe(file).base.model}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert sorted(FOLDER.iterdir()) == before


def write_pairs(file: Path, count: int, asked: str = "") -> Path:
    """Tiny preference rows. `asked` ends each prompt: held-out rows need prompts of their own."""
    rows = [row | {"prompt": row["prompt"] + asked} for row in pair_rows(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@every_recipe
def test_two_steps_on_a_tiny_model(file: Path, small_model: Path, tmp_path: Path):
    """Model, data and number of steps are replaced; every other key is the recipe's."""
    recipe = load_recipe(file)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 72)
    words = [f"base.model={small_model}", f"data.train={pairs}", f"run_directory={tmp_path / 'run'}"]
    words += ["training.max_steps=2"]
    if recipe.data.eval:
        words += [f"data.eval={write_pairs(tmp_path / 'held_out.jsonl', 8, asked='?')}"]
    seen: list[Record] = []
    run = train(override(recipe, words), observers=[seen.append], quiet=True)
    told = [("step", 1), ("step", 2), ("evaluation", 2)]
    if not recipe.loss.needs.rewards:  # a reward model says nothing by itself that could have shifted
        told.insert(0, ("shift", 0))
    assert [(record.kind, record.step) for record in seen] == told
    assert all(math.isfinite(value) for record in seen for value in record.metrics.values())
    if recipe.loss.needs_reference:
        steps = [record for record in seen if record.kind == "step"]
        assert steps[0].metrics["loss"] == pytest.approx(math.log(2), abs=1e-3)
    tensors = load_file(run.adapter_folder / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {recipe.adapter.rank}


def test_the_plain_loop_trains_and_saves_an_adapter(small_model: Path, tmp_path: Path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PLAIN_LOOP), str(small_model), str(pairs), "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"step 1/2  loss {math.log(2):.4f}  margin 0.0000  accuracy 0.5000" in done.stdout
    assert "step 2/2" in done.stdout
    assert "held out: accuracy" in done.stdout
    adapter = tmp_path / "runs" / "plain_loop"
    assert any(
        t.any() for name, t in load_file(adapter / "adapter_model.safetensors").items() if "_B" in name
    )
    assert (adapter / "tokenizer.json").is_file()


def test_the_plain_loop_is_short_and_in_the_table():
    assert len(PLAIN_LOOP.read_text(encoding="utf-8").splitlines()) < 120
    readme_row(PLAIN_LOOP)
    for name in OFFLINE:
        readme_row(FOLDER / name)
