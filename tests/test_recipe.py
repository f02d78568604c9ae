"""One schema and one parser, whichever door a value comes through."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_dpo.errors import RecipeError
from lora_dpo.losses import DPO, IPO, LDDPO, SFT, ChosenSFT, Sum
from lora_dpo.recipe import (
    Adapter,
    Base,
    Data,
    Recipe,
    Source,
    Training,
    from_dict,
    keys_of,
    load_recipe,
    override,
    to_dict,
    to_yaml,
)

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
RECIPE = Recipe(base=Base("some/model"), data=Data("pairs.jsonl"))


def changed(*overrides: str) -> Recipe:
    return override(RECIPE, overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        changed(*overrides)
    return str(caught.value)


@given(
    st.builds(
        Recipe,
        base=st.builds(Base, st.just("m"), quantization=st.sampled_from(["nf4", "fp4", "int8", "none"])),
        data=st.builds(
            Data,
            st.one_of(
                st.just("a.json"),
                st.lists(st.one_of(st.just("b.csv"), st.builds(Source, st.just("c"))), min_size=1).map(tuple),
            ),
            eval_last=st.integers(0, 9),
            max_rows=st.none() | st.integers(1, 9),
        ),
        loss=st.one_of(st.builds(DPO, st.floats(1e-3, 10)), st.builds(SFT)),
        adapter=st.builds(
            Adapter, rank=st.integers(1, 512), targets=st.sampled_from(["all-linear", ("q", "v")])
        ),
        training=st.builds(
            Training, learning_rate=st.floats(1e-9, 1), trackers=st.sampled_from([(), ("tensorboard",)])
        ),
    )
)
def test_a_recipe_survives_its_yaml(recipe: Recipe):
    import yaml

    assert from_dict(yaml.safe_load(to_yaml(recipe))) == recipe


def test_yaml_and_script_and_overrides_give_the_same_recipe(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(to_yaml(RECIPE))
    made = "Recipe(base=Base('some/model'), data=Data('pairs.jsonl'))"
    script = f"from lora_dpo import Base, Data, Recipe\nrecipe = {made}\n"
    (tmp_path / "r.py").write_text(script)
    words = ["loss.beta=0.05", "training.learning_rate=5e-6", "adapter.targets=q_proj,v_proj"]
    recipes = [load_recipe(tmp_path / name, words) for name in ("r.yaml", "r.py")]
    assert recipes[0] == recipes[1] == changed(*words)
    assert recipes[0].loss == DPO(0.05)
    assert recipes[0].training.learning_rate == 5e-6
    assert recipes[0].adapter.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.pairs_per_step=64", 64),
        ("training.learning_rate=1e-4", 1e-4),
        ("base.fused_kernels=false", False),
        ("data.max_rows=null", None),
        ("data.train=[a.json, {path: b.json, weight: 0.5}]", ("a.json", Source("b.json", 0.5))),
        ("training.trackers=tensorboard,wandb", ("tensorboard", "wandb")),
        ("loss=SFT", SFT()),
        ("--loss.beta=0.3", 0.3),
        ("run_directory=runs/x=y", "runs/x=y"),
        ("data.chat_template={% for m in messages %}{{ m.content }}{% endfor %}", TEMPLATE),
        ("data.chat_template=[INST]", "[INST]"),
    ],
)
def test_text_becomes_the_typed_value(text: str, value: object):
    recipe = changed(text)
    for name in text.lstrip("-").partition("=")[0].split("."):
        recipe = getattr(recipe, name)
    assert recipe == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainin.learning_rate=1", ["trainin.learning_rate", "training.learning_rate"]),
        ("training.lr=1", ["training.lr", "training.learning_rate"]),
        ("lr=1", ["unknown key lr", "training.learning_rate"]),
        ("loss.bata=1", ["loss.bata", "loss.beta"]),
        ("adapter.r=8", ["adapter.r", "adapter.rank"]),
        ("learning_rate=1", ["training.learning_rate"]),
        ("training.learning_rate=fast", ["training.learning_rate", "'fast'", "a number, greater than 0"]),
        ("training.learning_rate=nan", ["training.learning_rate", "nan"]),
        ("training.max_steps=1.5", ["training.max_steps", "whole number"]),
        ("training.pairs_per_step=0", ["training.pairs_per_step", "at least 1"]),
        ("base.fused_kernels=maybe", ["true or false"]),
        ("training.gradient_checkpointing=true", ["none", "layers", "offload"]),
        ("base.quantization=nf5", ["base.quantization", "'nf5'", "nf4, fp4, int8, none", "Did you mean nf4"]),
        ("loss=DPQ", ["DPQ", "DPO, IPO, Hinge", "Did you mean DPO"]),
        ("loss.beta=-1", ["loss.beta", "-1", "greater than 0"]),
        ("data.train={path: b.json, weigt: 2}", ["weigt", "data.train.weight"]),
        ("data.train=[a.json, {path: b.json, weigt: 2}]", ["data.train[1].weigt", "data.train[1].weight"]),
        ("training.seed=99999999999999999999999", ["training.seed", "at most"]),
        ("adapter.targets=[]", ["adapter.targets", "all-linear"]),
        ("data.max_prompt_tokens=4096", ["data.max_prompt_tokens", "data.max_tokens"]),
        ("training.early_stopping=2", ["training.best_metric"]),
        ("training.best_metric=loss", ["training.eval_every"]),
        ("beta", ["key=value"]),
        ("training=3", ["training", "'3'"]),
        ("data.train=[a", ["data.train"]),
    ],
)
def test_a_bad_value_is_refused_naming_the_key_what_it_got_and_what_it_takes(text: str, words: list[str]):
    message = refusal(text)
    assert all(word in message for word in words), message


def test_two_ways_to_hold_out_rows_are_refused_but_overrides_apply_all_at_once():
    assert "keep one" in refusal("data.eval_fraction=0.1", "data.eval_last=3")
    begun = changed("data.eval_fraction=0.1")
    assert override(begun, ["data.eval_fraction=0", "data.eval_last=3"]).data.eval_last == 3


def test_python_values_are_checked_like_text():
    with pytest.raises(RecipeError, match=r"adapter\.rank got -1"):
        Adapter(rank=-1)
    with pytest.raises(RecipeError, match=r"training\.schedule"):
        Training(schedule="cosin")  # pyright: ignore
    with pytest.raises(RecipeError, match=r"training\.epochs"):
        Training(epochs=True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.yaml", None, "no recipe file"),
        ("list.yaml", "- a\n", "no mapping"),
        ("broken.yaml", "base: [", "is not YAML"),
        ("empty.yaml", "data: {train: x}\n", "base is missing"),
        ("extra.yaml", "base: {model: m, modl: n}\ndata: {train: x}\n", "base.modl"),
        ("no_recipe.py", "x = 1\n", "variable `recipe`"),
        ("notes.txt", "x", "a .py or a .yaml"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_words(
    tmp_path: Path, name: str, text: str | None, words: str
):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / name)


def test_every_key_has_a_value_and_says_what_it_takes():
    keys = {key: takes for key, takes, _ in keys_of(RECIPE)}
    assert len(keys) > 40
    assert keys["training.learning_rate"] == "a number, greater than 0"
    assert keys["base.quantization"] == "one of nf4, fp4, int8, none"


def test_a_path_object_is_a_path_and_a_dataset_dict_is_refused_naming_its_splits():
    from datasets import Dataset, DatasetDict

    assert Data(Path("a.json")).train == "a.json"  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match=r"data\.train got a DatasetDict.*train, test"):
        Data(DatasetDict({"train": Dataset.from_list([]), "test": Dataset.from_list([])}))


def test_a_script_may_import_what_lies_beside_it(tmp_path: Path):
    (tmp_path / "beside_me.py").write_text("MODEL = 'some/model'\n")
    script = "from beside_me import MODEL\nfrom lora_dpo import Base, Data, Recipe\n"
    (tmp_path / "r.py").write_text(script + "recipe = Recipe(base=Base(MODEL), data=Data('pairs.jsonl'))\n")
    assert load_recipe(tmp_path / "r.py") == RECIPE


def test_a_dataset_from_python_is_kept_and_named_in_the_record():
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    recipe = Recipe(base=Base("m"), data=Data(rows))
    assert recipe.data.train is rows
    assert to_dict(recipe)["data"]["train"] == "<Dataset of 1 rows given from Python>"


def test_objectives_inside_objectives_are_named_overridden_and_replayed(tmp_path: Path):
    terms = "[{objective: LDDPO, of: IPO, alpha: 0.3}, ChosenSFT]"
    text = f"loss={{objective: Sum, terms: {terms}, weights: [1, 0.2]}}"
    recipe = override(RECIPE, [text])
    assert recipe.loss == Sum((LDDPO(of=IPO(), alpha=0.3), ChosenSFT()), (1.0, 0.2))
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe
    inner = override(RECIPE, ["loss=LDDPO", "loss.of=IPO", "loss.alpha=0.2"])
    assert inner.loss == LDDPO(of=IPO(), alpha=0.2)
    both = changed("loss=LDDPO", "loss.of=IPO", "loss.of.beta=0.7", "loss.alpha=0.2")
    assert both.loss == override(inner, ["loss.of.beta=0.7"]).loss == LDDPO(of=IPO(beta=0.7), alpha=0.2)
    with pytest.raises(RecipeError, match=r"unknown key loss\.of\.betta.*loss\.of\.beta"):
        override(inner, ["loss.of.betta=0.7"])
    with pytest.raises(RecipeError, match=r"loss\.beta"):
        override(RECIPE, ["loss.beta.of=1"])


OWN = """
from dataclasses import dataclass
from lora_dpo import Base, Data, Loss, LogProbs, Objective, Recipe

@dataclass(frozen=True)
class Squared(Objective):
    goal: float = 1.0

    def __call__(self, logprobs: LogProbs) -> Loss:
        ratio = logprobs.log_ratio
        return Loss((ratio[:, 0] - ratio[:, 1] - self.goal) ** 2)

recipe = Recipe(base=Base("base"), data=Data("rows.jsonl"), loss=Squared(goal=0.5))
"""


def test_an_objective_of_the_users_own_is_named_by_its_file_and_replayed(tmp_path: Path):
    script = tmp_path / "mine.py"
    script.write_text(OWN)
    recipe = override(load_recipe(script), ["loss.goal=0.25"])
    record = tmp_path / "recipe.yaml"
    record.write_text(to_yaml(recipe))
    assert f"{script}:Squared" in record.read_text()
    again = load_recipe(record)
    assert to_dict(again) == to_dict(recipe)
    assert type(again.loss).__name__ == "Squared" and again.loss.goal == 0.25  # pyright: ignore
    assert isinstance(override(RECIPE, [f"loss={script}:Squared"]).loss, type(again.loss).__mro__[1])


INHERITING = """
from __future__ import annotations
from dataclasses import dataclass
from torch import Tensor
from lora_dpo import DPO
from lora_dpo.losses import Positive

@dataclass(frozen=True)
class Squared(DPO):
    goal: Positive = 1.0

    def of_margin(self, margin: Tensor) -> Tensor:
        return (margin - self.goal) ** 2

class Undecorated(DPO):
    pass

class Broken(
"""


def test_an_own_objective_may_inherit_and_annotate_with_text(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(INHERITING.replace("class Broken(\n", ""))
    recipe = override(RECIPE, [f"loss={file}:Squared", "loss.goal=0.5"])
    assert to_dict(recipe)["loss"]["objective"] == f"{file}:Squared"
    assert to_dict(from_dict(to_dict(recipe))) == to_dict(recipe)
    with pytest.raises(RecipeError, match=r"loss\.goal"):
        override(recipe, ["loss.goal=0"])
    with pytest.raises(RecipeError, match=r"put @dataclass\(frozen=True\) above class Undecorated"):
        override(RECIPE, [f"loss={file}:Undecorated"])
    file.write_text(INHERITING)
    with pytest.raises(RecipeError, match=r"loss\.objective got .*mine\.py, line 18: .* was never closed"):
        override(RECIPE, [f"loss={file}:Squared"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:Mine", "nowhere.py"),
        ("no_such_module:Mine", "no_such_module"),
        ("lora_dpo.losses:Missing", "no such class Missing"),
        ("lora_dpo.errors:UserError", "no lora_dpo.Objective UserError"),
    ],
)
def test_an_objective_that_cannot_be_found_is_refused(name: str, words: str):
    with pytest.raises(RecipeError, match=words):
        override(RECIPE, [f"loss={name}"])
