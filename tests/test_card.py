"""A card says what is known, to the printed digit, and nothing that isn't; nobody's strings break it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import pytest
import yaml
from builders import pair_rows
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lora_dpo import __version__
from lora_dpo.export.card.card import PICTURE, write_card
from lora_dpo.export.card.facts import Kind
from lora_dpo.export.card.licence import front_matter
from lora_dpo.export.card.markdown import fenced
from lora_dpo.finished import evaluate_run, open_finished
from lora_dpo.losses import DPO, IPO, KTO, LDDPO, ORPO, SFT, DiscoPOP, Sum
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Reference, Training, from_dict
from lora_dpo.recipe import Source as DataSource
from lora_dpo.run_directory import MANIFEST, RunDirectory
from lora_dpo.training import train

KINDS: list[Kind] = ["adapter", "merged", "gguf", "gguf-adapter", "ollama"]
HOSTILE = (
    "x</code><script>alert(1)</script>|a|`` ``` ~~~ [l](javascript:1) ![i](http://e.vil/p.png) **b** <!--"
    " &lt; \u202e $x$ # h https://e.vil --- __u__ \\| \\"
)


@dataclass(frozen=True)
class Source:
    """What is exported, by the fields that a card looks at."""

    adapter: Path
    base: Base
    run: RunDirectory | None = None
    recipe: Recipe | None = None
    record: Any = None


@pytest.fixture(scope="module")
def run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Six steps, evaluated, with the record of its base beside the adapter."""
    folder = tmp_path_factory.mktemp("private-folder")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    recipe = Recipe(
        base=Base(str(small_model), compute_dtype="float32"),
        data=Data(str(folder / "pairs.jsonl"), eval_last=8),
        loss=DPO(beta=0.25),
        adapter=Adapter(rank=4),
        training=Training(pairs_per_step=8, epochs=20, max_steps=6, learning_rate=1e-2, eval_every=3),
        run_directory=str(folder / "run"),
    )
    directory = train(recipe, quiet=True)
    evaluate_run(open_finished(directory.path))
    (directory.adapter_folder / "trained_on.json").write_text(json.dumps(trained_on(str(small_model))))
    return directory


def trained_on(model: str, commit: str | None = None) -> dict[str, Any]:
    base = {"model": model, "revision": None, "commit": commit, "content": "0f" * 16}
    rest = {"quantization": "nf4", "double_quantization": True, "compute_dtype": "float32"}
    base["architecture"] = "LlamaForCausalLM"
    return {"format": 1, "base": base, **rest, "template": "ab" * 32, "lora_dpo": "0.0.9"}


def source_of(run: RunDirectory) -> Source:
    recipe = from_dict(yaml.safe_load(run.recipe_file.read_text()))
    return Source(run.adapter_folder, recipe.base, run, recipe)


def report(**changes: Any) -> dict[str, Any]:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}

    layers = [
        {"name": f"layers.{n}", "update": 0.01, "kept": 0.9 + n / 1000, "error": 0.1} for n in range(12)
    ]
    pairs = {
        "source": "/home/somebody/held_out.jsonl",
        "examples": 31,
        "tokens": 4711,
        "positions": 512,
        "arithmetic": "float32",
        "logprob_difference": {"mean": 0.001234, "largest": 0.05678},
        "kl": {"mean": 1.25e-05, "largest": 0.000321, "trained_from_base": 0.0625},
        "top1_agreement": 0.9976,
        "preference_accuracy": {"trained": interval(0.875), "exported": interval(0.75)},
        "margin": {
            "trained": interval(2.5),
            "exported": interval(2.25),
            "kept": 0.9123,
            "kept_interval": {"low": 0.8912, "high": 0.9345},
        },
    }
    whole = {
        "format": 1,
        "kind": "merged",
        "dtype": "bfloat16",
        "base": "dequantized",
        "passed": True,
        "failed": [],
        "accepted": False,
        "bars": {"update_kept": 0.9},
        "weights": {"kept": 0.9871, "error": 0.1234, "layers": layers},
        "pairs": pairs,
        "bases": None,
    }
    return whole | changes


def written(
    folder: Path,
    source: Source,
    found: Any = None,
    kind: Kind = "merged",
    *,
    drawn: bool = False,
    **options: Any,
) -> str:
    """The card's text. drawn: with its picture, which takes most of the time."""
    folder.mkdir(exist_ok=True)
    with nullcontext() if drawn else mock.patch("lora_dpo.export.card.card.draw_curves", return_value=True):
        write_card(folder, source, found, kind, **options)  # pyright: ignore[reportArgumentType]
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata(card: str) -> dict[str, Any]:
    """The front matter, as the hub's own library reads it, and as plain YAML does."""
    head = re.match(r"\A---\n(.*?)\n---\n\n# ", card, re.DOTALL)
    assert head is not None
    values = yaml.safe_load(head[1])
    assert ModelCard(card).data.to_dict() == values
    return values


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, text, cells of each table row."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def page(card: str) -> Page:
    body = card.split("\n---\n", 1)[1]
    shown = Page()
    shown.feed(MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(body))
    return shown


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def test_the_card_of_a_run_holds_its_evaluations_figures_to_the_printed_digit(
    run: RunDirectory, tmp_path: Path
):
    card = written(tmp_path / "out", source_of(run), report())
    evaluation = json.loads(run.evaluation_file.read_text())
    assert "On 8 pairs that the run held out." in card
    for found in evaluation["metrics"].values():
        assert f"| {found['mean']:.3f} | [{found['low']:.3f}, {found['high']:.3f}] |" in card
    accuracy = evaluation["metrics"]["rewards/accuracy"]
    said = f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
    assert f"Its preference accuracy on 8 held-out pairs is {said}." in card
    assert "| " + " | ".join(["margin", f"{evaluation['metrics']['rewards/margin']['mean']:.3f}"]) in card


def test_the_card_shows_the_runs_curves_from_beside_it(run: RunDirectory, tmp_path: Path):
    card = written(tmp_path / "out", source_of(run), None, drawn=True)
    images = [attributes["src"] for tag, attributes in page(card).tags if tag == "img"]
    assert images == [PICTURE]
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", PICTURE]


def test_the_card_says_what_it_was_trained_from_and_on(run: RunDirectory, tmp_path: Path):
    card = written(tmp_path / "out", source_of(run), report())
    for said in (
        "| content of its weights (xxh3-128) | `" + "0f" * 16 + "` |",
        "| quantization while training | `nf4` (bitsandbytes), double quantization |",
        "| computed in | `float32` |",
        "LoRA, rank 4, alpha 32",
        "| reference | the base with the adapter off |",
        "- `pairs.jsonl`: training",
        "held out: the last 8 rows",
        "used: 32 pairs to train on, 8 held out",
        "6 optimizer steps of 8 pairs",
        "`DPO` (β = 0.25)",
        "−log σ(β[(log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected))])",
        f"Trained with lora_dpo `0.0.9`, exported with lora_dpo `{__version__}`",
    ):
        assert said in card
    recipe = yaml.safe_load(blocks(card, "yaml")[0])
    mine = yaml.safe_load(run.recipe_file.read_text())
    for changed in ("base", "data", "run_directory"):
        mine.pop(changed)
        recipe.pop(changed)
    assert recipe == mine


def test_the_card_holds_the_reports_figures_to_the_printed_digit(run: RunDirectory, tmp_path: Path):
    card = written(tmp_path / "out", source_of(run), report())
    for said in (
        "The export meets its bars (`update_kept` 0.9).",
        "0.9871 of the update is kept",
        "by 0.1234 of the update's norm",
        "`held_out.jsonl`: 31 examples, 4,711 scored tokens, 512 positions, computed in `float32`",
        "| 0.001234 | 0.05678 |",
        "| 1.25e-05 | 0.000321 |",
        "training moved it | 0.0625 |",
        "| 0.9976 |",
        "| preference accuracy | 0.875 [0.750, 1.000] | 0.750 [0.625, 0.875] |",
        "| margin, in nats, without β | 2.500 [2.375, 2.625] | 2.250 [2.125, 2.375] |",
        "| **margin kept**, share | **0.9123** [0.8912, 0.9345] |",
        "The 10 of 12 layers that kept least",
    ):
        assert said in card
    kept = re.findall(r"\| `layers\.(\d+)` \| 0\.01 \| (\S+) \| 0\.1 \|", card)
    assert kept == [(str(n), f"{0.9 + n / 1000:.4g}") for n in range(10)]


@pytest.mark.parametrize("accepted", [False, True])
def test_missed_bars_and_their_acceptance_are_said_plainly(run: RunDirectory, tmp_path: Path, accepted: bool):
    failed = ["the weights kept 0.8 of the update; the bar is 0.9"]
    card = written(tmp_path / "out", source_of(run), report(passed=False, failed=failed, accepted=accepted))
    assert "**The export misses its bars**" in card
    assert f"- {failed[0]}" in card
    assert ("author accepted that" in card) == accepted
    assert "meets its bars" not in card


def test_where_nothing_was_compared_the_card_says_so(run: RunDirectory, tmp_path: Path):
    nothing = report(passed=None, pairs=None, not_compared="there are no held-out rows")
    card = written(tmp_path / "out", source_of(run), nothing)
    assert "**Nothing could be compared** with base + adapter on held-out rows: there are no held-out" in card
    assert "meets its bars" not in card
    assert "was not compared with base + adapter" in written(tmp_path / "none", source_of(run), None)


def test_an_export_onto_the_original_base_shows_both_bases(run: RunDirectory, tmp_path: Path):
    interval = {"mean": 1.5, "low": 1.25, "high": 1.75}
    bases = [
        {
            "name": name,
            "own_reference": f"the {name} alone",
            "logps_chosen": value,
            "logps_rejected": None,
            "preference_accuracy": interval,
            "margin": interval,
            "margin_over_quantized": interval,
        }
        for name, value in (("quantized base", -1.125), ("original base", -1.0625))
    ]
    card = written(tmp_path / "out", source_of(run), report(base="original", bases=bases))
    assert "**original** base" in card and "a different function" in card
    figures = "1.500 [1.250, 1.750]"
    for name, value in (("quantized base", "-1.125"), ("original base", "-1.062")):
        assert f"| `{name}` | `the {name} alone` | {value} | {figures} | {figures} | {figures} |" in card


@pytest.mark.parametrize("kind", KINDS)
def test_no_local_path_is_named_and_no_licence_is_made_up(run: RunDirectory, tmp_path: Path, kind: Kind):
    source = source_of(run)
    found = report(notes=[f"see {run.path}/adapter/x.json"], failed=[f"{tmp_path} was small"])
    card = written(tmp_path / "out", source, found, kind)
    assert source.recipe is not None
    told = (str(tmp_path), str(run.path), str(run.path.parent), source.base.model, str(Path.home()), "/home/")
    for private in (*told, "private-folder", "/tmp"):
        assert private not in card
    assert not {"license", "license_name", "license_link", "base_model"} & metadata(card).keys()
    assert "Unknown: no file of" in card


@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_to_load_it_are_those_of_the_kind(run: RunDirectory, tmp_path: Path, kind: Kind):
    folder = tmp_path / "out"
    folder.mkdir()
    if "gguf" in kind:
        (folder / "my model.gguf").write_bytes(b"")
    card = written(folder, source_of(run), report(), kind)
    ways = set(re.findall(r"^\*\*([a-zA-Z.]+)[^*]*\*\*", card, re.MULTILINE))
    expected = {
        "adapter": {"transformers", "vLLM", "llama.cpp", "Ollama"},
        "merged": {"transformers", "vLLM", "llama.cpp", "Ollama"},
        "gguf": {"llama.cpp", "Ollama"},
        "gguf-adapter": {"llama.cpp", "Ollama"},
        "ollama": {"Ollama"},
    }
    assert ways == expected[kind]
    assert ("PeftModel" in card) == (kind == "adapter")
    assert ("my model.gguf" in card) == ("gguf" in kind)
    for block in blocks(card, "bash"):
        for line in block.splitlines():
            assert shlex.split(line, comments=True)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_printed_python_runs_as_it_stands(
    run: RunDirectory,
    small_model: Path,
    tmp_path: Path,
    kind: Kind,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "out"
    shutil.copytree(run.adapter_folder if kind == "adapter" else small_model, folder)
    code = blocks(written(folder, source_of(run), None, kind), "python")[0]
    assert "path/to/the/base" in code or kind == "merged"
    code = code.replace("path/to/the/base", str(small_model)).replace(
        "max_new_tokens=256", "max_new_tokens=2"
    )
    monkeypatch.chdir(folder)
    capsys.readouterr()
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["answer"].shape[1] == found["inputs"]["input_ids"].shape[1] + 2
    assert capsys.readouterr().out.endswith("\n")
    assert hasattr(found["model"], "peft_config") == (kind == "adapter")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one base, as a download leaves it; returns the snapshot's folder."""
    repository = tmp_path / "hub" / "models--some-org--Base-7B"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def of_the_hub(tmp_path: Path, recipe: Recipe | None = None, **adapter: Any) -> Source:
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "trained_on.json").write_text(json.dumps(trained_on("some-org/Base-7B", COMMIT)))
    config = {"r": 16, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"], **adapter}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = Base("some-org/Base-7B", revision="main")
    return Source(folder, base, None, None if recipe is None else replace(recipe, base=base))


def hub_recipe(**changes: Any) -> Recipe:
    train = (
        "org/pairs:train_prefs",
        DataSource("org/more:config:train", weight=0.5, rows=1000),
        "/home/somebody/own.jsonl",
        "org/pairs:other",
    )
    values: dict[str, Any] = {"base": Base("some-org/Base-7B"), "data": Data(train, eval="org/pairs:test")}
    return Recipe(**values | changes)


@pytest.mark.parametrize(
    ("kind", "relation", "library"),
    [
        ("adapter", "adapter", "peft"),
        ("merged", "finetune", "transformers"),
        ("gguf", "finetune", None),
        ("gguf-adapter", "adapter", None),
        ("ollama", "finetune", None),
    ],
)
def test_the_front_matter_of_a_hub_base_names_base_relation_library_licence_and_data_sets(
    hub_cache: Path, tmp_path: Path, kind: Kind, relation: str, library: str | None
):
    (hub_cache / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    card = written(tmp_path / "out", of_the_hub(tmp_path, hub_recipe()), None, kind)
    gguf = ["gguf"] if "gguf" in kind else []
    expected = {
        "base_model": "some-org/Base-7B",
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["lora_dpo", "lora", "dpo", *gguf],
        "datasets": ["org/pairs", "org/more"],
    }
    assert metadata(card) == {key: value for key, value in expected.items() if value is not None}
    assert f"| commit | `{COMMIT}` |" in card
    assert "- [`org/more:config:train`](https://huggingface.co/datasets/org/more): training" not in card
    assert "- [`org/more:config:train`](https://huggingface.co/datasets/org/more), at most 1,000" in card
    assert "own.jsonl" in card and "somebody" not in card


def test_an_ollama_folder_with_an_adapter_is_related_as_an_adapter(hub_cache: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "Modelfile").write_text("FROM llama3\nADAPTER ./adapter.gguf\n")
    card = written(tmp_path / "out", of_the_hub(tmp_path), None, "ollama")
    assert metadata(card)["base_model_relation"] == "adapter"


def test_a_licence_by_another_name_is_linked_at_the_base(hub_cache: Path, tmp_path: Path):
    head = {"license": "other", "license_name": "base-licence", "license_link": "LICENSE"}
    (hub_cache / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n")
    (hub_cache / "LICENSE").write_text("words")
    card = written(tmp_path / "out", of_the_hub(tmp_path), None, "adapter")
    values = metadata(card)
    assert (values["license"], values["license_name"]) == ("other", "base-licence")
    assert values["license_link"] == "https://huggingface.co/some-org/Base-7B/blob/main/LICENSE"
    assert "Beside it: `LICENSE`." in card


@pytest.mark.parametrize(
    "readme",
    [
        "no front matter, license: mit",
        "---\nlicense: [mit, gpl]\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: |\n  mit\n  injected: yes\n---\n",
        "---\nlicense: 'a\\nb: c'\n---\n",
        '---\nlicense: "mit\\n---\\n# heading"\n---\n',
        "---\nlicense: [\n---\n",
        "---\n"
        + "a: &a [x, x, x, x, x, x, x, x]\n"
        + "b: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n" * 1
        + "---\n",
        "---\n- license\n---\n",
        "---\nlicense: !!python/object/apply:os.system [x]\n---\n",
        "\ufeff\x00",
    ],
)
def test_a_readme_that_names_no_licence_gives_none(hub_cache: Path, tmp_path: Path, readme: str):
    (hub_cache / "README.md").write_text(readme)
    card = written(tmp_path / "out", of_the_hub(tmp_path), None, "adapter")
    assert not {"license", "injected"} & metadata(card).keys()
    assert "Unknown: no file of" in card


def test_the_licence_of_a_local_base_is_read_from_its_own_folder(
    run: RunDirectory, small_model: Path, tmp_path: Path
):
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    (base / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\n---\n")
    card = written(tmp_path / "out", replace(source_of(run), base=Base(str(base))), None, "merged")
    values = metadata(card)
    assert values["license"] == "mit"
    assert "license_link" not in values, "a file of the user's own folder is no address"


def test_a_bare_adapter_has_a_card_that_says_what_is_unknown(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    card = written(
        tmp_path / "out", Source(tmp_path / "adapter", Base("org/name")), None, "adapter", drawn=True
    )
    for said in (
        "what that was trained on is not recorded",
        "## What it was trained on\n\nUnknown",
        "Nothing was measured on held-out examples, or it was not recorded",
        "This export was not compared with base + adapter",
        "The base's commit and the hash of its weights were not recorded",
    ):
        assert said in card
    assert "| commit |" not in card and "## Objective" not in card and "datasets" not in metadata(card)
    assert not (tmp_path / "out" / PICTURE).exists() and PICTURE not in card


def test_damaged_and_missing_files_of_a_run_leave_their_facts_out(run: RunDirectory, tmp_path: Path):
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    (copy.adapter_folder / "trained_on.json").write_text("[1]")
    (copy.adapter_folder / "adapter_config.json").write_bytes(b"\xff{")
    copy.evaluation_file.write_text('{"examples": "many", "metrics": {"loss": null, "x": {"mean": NaN}}}')
    copy.metrics_file.write_text('{"step": 1, "kind": "step", "loss": null}\n')
    shutil.rmtree(copy.checkpoints_folder)
    source = replace(source_of(run), adapter=copy.adapter_folder, run=copy)
    card = written(tmp_path / "out", source, report(), "adapter", drawn=True)
    metadata(card)
    assert "used:" not in card and "rank" not in card.split("<details>")[0]
    assert "| loss | not a number |" in card and "| `x` | not a number |" in card
    assert not (tmp_path / "out" / PICTURE).exists()


def test_without_an_evaluation_the_last_one_of_the_metrics_is_shown(run: RunDirectory, tmp_path: Path):
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    copy.evaluation_file.unlink()
    last = [r for r in copy.records() if r["kind"] == "evaluation"][-1]
    card = written(tmp_path / "out", replace(source_of(run), run=copy), report(), "merged")
    assert last["step"] == 6
    assert "after step 6. Means without intervals" in card
    assert f"| preference accuracy | {last['eval/rewards/accuracy']:.3f} | share" in card
    assert "95% interval" not in card.split("## What the export kept")[0]


@pytest.mark.parametrize(("metric", "step"), [("loss", 20), ("rewards/accuracy", 30), (None, 40)])
def test_the_evaluation_of_the_adapter_that_was_kept_is_shown(
    run: RunDirectory, tmp_path: Path, metric: str | None, step: int
):
    copy = RunDirectory(tmp_path / "copy")
    copy.path.mkdir()
    figures = {10: (0.6, 0.5), 20: (0.3, 0.6), 30: (0.4, 0.9), 35: (0.4, 0.9), 40: (0.5, 0.7)}
    for n, (loss, accuracy) in figures.items():
        values = {"eval/loss": loss, "eval/rewards/accuracy": accuracy}
        copy.append_record({"step": n, "kind": "evaluation", **values})
    source = source_of(run)
    assert source.recipe is not None
    training = replace(source.recipe.training, best_metric=metric)
    recipe = replace(source.recipe, training=training)
    card = written(tmp_path / "out", replace(source, run=copy, recipe=recipe), None, "adapter")
    loss, accuracy = figures[step]
    assert f"after step {step}." in card
    assert f"| loss | {loss:.3f} |" in card and f"| preference accuracy | {accuracy:.3f} |" in card


def test_rows_that_an_evaluation_was_given_are_named(run: RunDirectory, tmp_path: Path):
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    for made_up in ("trained_on.json", MANIFEST):  # the fixture's is of no real base
        (copy.adapter_folder / made_up).unlink()
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(8)))
    assert json.loads(copy.evaluation_file.read_text())["source"] is None
    evaluate_run(open_finished(copy.path, data=str(tmp_path / "given.jsonl")))
    assert json.loads(copy.evaluation_file.read_text())["source"] == str(tmp_path / "given.jsonl")
    card = written(tmp_path / "out", replace(source_of(run), run=copy), None, "adapter")
    assert "On 8 pairs of `given.jsonl`, not of those that the run held out. Means" in card
    assert "Its preference accuracy on" not in card and str(tmp_path) not in card


def test_the_card_says_why_its_two_margins_differ(run: RunDirectory, tmp_path: Path):
    why = "there the margin is that of the objective's implicit rewards, β = 0.25 included"
    assert why in written(tmp_path / "both", source_of(run), report())
    assert why not in written(tmp_path / "one", source_of(run), report(pairs=None))
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    copy.evaluation_file.unlink()
    copy.metrics_file.unlink()
    assert why not in written(tmp_path / "other", replace(source_of(run), run=copy), report())


@pytest.mark.parametrize("change", [{"examples": 7}, {"loss": 2.0}])
def test_an_evaluation_on_other_rows_is_not_called_the_runs_own(
    run: RunDirectory, tmp_path: Path, change: dict[str, Any]
):
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    evaluation = json.loads(copy.evaluation_file.read_text())
    if "loss" in change:
        evaluation["metrics"]["loss"]["mean"] *= change["loss"]
    else:
        evaluation |= change
    copy.evaluation_file.write_text(json.dumps(evaluation))
    card = written(tmp_path / "out", replace(source_of(run), run=copy), None, "adapter")
    assert "that the run held out." not in card
    assert "they may be others" in card
    assert "Its preference accuracy on" not in card


@pytest.mark.parametrize(
    "loss",
    [IPO(), DiscoPOP(), SFT(), KTO(), ORPO(), LDDPO(of=IPO(), alpha=0.5), Sum()],
    ids=lambda loss: type(loss).__name__,
)
def test_every_kind_of_objective_has_its_words_and_formula(tmp_path: Path, loss: Any):
    card = written(tmp_path / "out", of_the_hub(tmp_path, hub_recipe(loss=loss)), None, "adapter")
    name = type(loss).__name__
    assert name.lower() in metadata(card)["tags"]
    text = blocks(card, "text")[0]
    inner = [getattr(loss, "of", None), *getattr(loss, "terms", ())]
    for one in (loss, *(item for item in inner if item is not None)):
        assert f"{type(one).__name__}: " in text
        assert (type(one).__doc__ or "").split("\n")[0] in text
    assert ("β says how strongly" in card) == (hasattr(loss, "beta") and loss.needs_reference)
    assert ("Preference accuracy compares" in card) == (loss.records == "pairs")


@dataclass(frozen=True)
class Mine(DPO):
    """The user's own words: see /home/somebody/notes."""


def test_an_objective_of_the_users_own_is_named_and_no_more(tmp_path: Path):
    card = written(tmp_path / "out", of_the_hub(tmp_path, hub_recipe(loss=Mine())), None, "adapter")
    assert "Mine: an objective of the run's own" in card
    assert "mine" not in metadata(card)["tags"]
    assert "own words" not in card and str(Path(__file__).parent) not in card


def test_an_adapter_that_servers_would_misread_gets_no_command_for_them(tmp_path: Path):
    changes = {
        "use_dora": True,
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"q_proj": 8},
        "target_modules": ["q_proj", "lm_head"],
    }
    for key, value in changes.items():
        card = written(tmp_path / "out", of_the_hub(tmp_path, **{key: value}), None, "adapter")
        assert "vllm serve" not in card and "convert_lora_to_gguf" not in card and "ollama create" not in card
        assert "--to merged" in card
    scaled = written(tmp_path / "out", of_the_hub(tmp_path, use_rslora=True), None, "adapter")
    assert "vllm serve" in scaled and "convert_lora_to_gguf" not in scaled


@pytest.mark.parametrize(("rank", "flag"), [(8, None), (16, None), (17, 32), (64, 64), (100, 128)])
def test_a_rank_above_vllms_default_is_given_as_a_flag(tmp_path: Path, rank: int, flag: int | None):
    card = written(tmp_path / "out", of_the_hub(tmp_path, r=rank), None, "adapter")
    line = next(line for line in card.splitlines() if line.startswith("vllm serve"))
    assert ("--max-lora-rank" in line) == (flag is not None)
    assert flag is None or f"--max-lora-rank {flag}" in line
    assert f"--revision {COMMIT}" in line


@pytest.mark.parametrize("own", [True, False])
def test_a_chat_template_of_the_runs_own_is_given_to_servers(tmp_path: Path, own: bool):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages }}")
    data = Data("org/pairs", chat_template="{{ messages }}" if own else None)
    card = written(tmp_path / "out", of_the_hub(tmp_path, hub_recipe(data=data)), None, "adapter")
    lines = [line for block in blocks(card, "bash") for line in block.splitlines()]
    given = [line for line in lines if "chat_template.jinja" in line]
    assert [line.split()[0] for line in given] == (["vllm", "llama-cli"] if own else [])


def test_a_repository_takes_the_folders_place_where_it_will_be_pushed(tmp_path: Path):
    card = written(tmp_path / "out", of_the_hub(tmp_path), None, "adapter", repository="me/mine")
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card
    assert "=me/mine" in card and "hf download me/mine" in card


def hostile_recipe() -> Recipe:
    return hub_recipe(
        base=Base(f"/models/{HOSTILE}"),
        data=Data(
            f"/data/{HOSTILE}.jsonl", eval=f"/data/{HOSTILE}", chat_template=f"{{{{{HOSTILE}}}}}\n```\n"
        ),
        adapter=Adapter(start_from=f"/a/{HOSTILE}", modules_to_save=("```\n</details>",)),
        reference=Reference(adapter=f"/b/{HOSTILE}"),
        training=Training(eval_every=1, best_metric=HOSTILE),
        run_directory=f"/r/{HOSTILE}",
    )


def hostile_source(tmp_path: Path) -> Source:
    source = of_the_hub(tmp_path, target_modules=[HOSTILE, 5], modules_to_save=HOSTILE, r=HOSTILE)
    record = trained_on(HOSTILE, HOSTILE)
    record["base"]["architecture"] = record["template"] = record["lora_dpo"] = HOSTILE
    (source.adapter / "trained_on.json").write_text(json.dumps(record | {"quantization": HOSTILE}))
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    metrics = {HOSTILE: {"mean": 1.0, "low": 0.5, "high": 2.0}, "a|b": 1.5}
    run.evaluation_file.write_text(json.dumps({"examples": 3, "metrics": metrics}))
    run.append_record({"step": 1, "kind": "evaluation", f"eval/{HOSTILE}": 1.0})
    recipe = hostile_recipe()
    return Source(source.adapter, recipe.base, run, recipe)


def hostile_report() -> dict[str, Any]:
    base = {"name": HOSTILE, "own_reference": HOSTILE, "logps_chosen": 1.0, "margin": HOSTILE}
    return report(
        dtype=HOSTILE,
        failed=[HOSTILE, f"- {HOSTILE}", f"1. {HOSTILE}"],
        bars={HOSTILE: 1.0},
        weights={"kept": HOSTILE, "error": 1, "layers": [{"name": HOSTILE, "kept": 1, "update": "|"}, 3]},
        pairs={"source": HOSTILE, "arithmetic": HOSTILE, "examples": "x", "margin": {"kept": HOSTILE}},
        not_compared=HOSTILE,
        notes=[HOSTILE],
        bases=[base, base],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_markup_in_anybodys_strings_stays_text(tmp_path: Path, kind: Kind):
    plain = page(written(tmp_path / "plain", of_the_hub(tmp_path, hub_recipe()), report(), kind))
    card = written(tmp_path / "out", hostile_source(tmp_path), hostile_report(), kind)
    metadata(card)
    shown = page(card)
    assert {tag for tag, _ in shown.tags} <= {tag for tag, _ in plain.tags}
    for tag, attributes in shown.tags:
        assert not {name for name in attributes if name.startswith("on")} and "style" not in attributes
        if tag == "a":
            assert str(attributes["href"]).startswith("https://huggingface.co/")
    assert sum(tag == "details" for tag, _ in shown.tags) == card.count("<details>")
    assert "\u202e" not in card
    assert "alert(1)" in shown.text and "<script>" in shown.text
    headings = re.findall(r"^#+ .*$", re.sub(r"^(`{3,}).*?^\1`*$", "", card, flags=re.M | re.S), re.MULTILINE)
    assert len(headings) == len(re.findall("<h[12]>", " ".join(f"<{tag}>" for tag, _ in shown.tags)))


def test_no_cell_of_a_table_splits_at_anybodys_bar(tmp_path: Path):
    shown = page(written(tmp_path / "out", hostile_source(tmp_path), hostile_report(), "merged"))
    assert set(shown.rows) <= {2, 3, 4, 5}
    assert "x</code><script>alert(1)</script>|a|`` ```" in " ".join(shown.text.split())


def test_a_fence_inside_the_recipe_ends_nothing(tmp_path: Path):
    template = "{{ a }}\n```\n</details>\n# heading\n````\n"
    data = Data("org/pairs", chat_template=template)
    card = written(tmp_path / "out", of_the_hub(tmp_path, hub_recipe(data=data)), None, "adapter")
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.split("\n---\n", 1)[1])
    recipe = next(token.content for token in tokens if token.type == "fence" and token.info == "yaml")
    values = yaml.safe_load(recipe)
    assert values["data"]["chat_template"] == template
    assert values["run_directory"] == "latest", "of runs/latest"


@pytest.mark.parametrize("text", ["```", "a\n````\nb\n```\nc", "~~~\n</details>", "`", ""])
def test_a_block_of_code_ends_where_it_ends(text: str):
    tokens = MarkdownIt("commonmark").parse(f"{fenced(text)}\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content == f"{text}\n"


def test_shell_commands_hold_hostile_names_as_single_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "out"
    folder.mkdir()
    name = "a'; rm -rf $(x) `y` & .gguf"
    (folder / name).write_bytes(b"")
    for kind in ("gguf", "gguf-adapter"):
        card = written(folder, of_the_hub(tmp_path), None, kind)
        lines = [line for block in blocks(card, "bash") for line in block.splitlines()]
        run = next(shlex.split(line, comments=True) for line in lines if line.startswith("llama-cli"))
        assert f"./{name}" in run
        made = next(shlex.split(line) for line in lines if line.startswith("printf"))
        assert made[-2:] == [">", "Modelfile"]
        assert any(word.endswith(f"./{name}") for word in made)


def test_no_access_token_gets_into_a_card(tmp_path: Path):
    token = "hf_" + "aB3" * 11
    recipe = hub_recipe(
        data=Data(f"/data/{token}.jsonl", chat_template="{{ '" + token + "' }}"),
        training=Training(trackers=(token,)),
    )
    card = written(tmp_path / "out", of_the_hub(tmp_path, recipe), report(notes=[token]), "merged")
    assert token not in card


def test_the_front_matter_of_endless_yaml_is_none(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n" + "\n".join(lines) + "\n---\n")
    assert front_matter(tmp_path / "README.md") == {}
