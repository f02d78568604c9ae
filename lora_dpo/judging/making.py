"""A `Judge` of the recipe → the judge itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_dpo.errors import ModelError, RecipeError
from lora_dpo.finished import open_finished, reference_of
from lora_dpo.judging.classifier import ClassifierJudge
from lora_dpo.judging.endpoint import EndpointJudge
from lora_dpo.judging.function import FunctionJudge, function_judge
from lora_dpo.judging.implicit import BETA, ImplicitJudge
from lora_dpo.judging.judges import JudgeProtocol
from lora_dpo.judging.reward_model import RewardJudge
from lora_dpo.model import Model, bare, load_adapter
from lora_dpo.model.bare import check_bare
from lora_dpo.recipe import Judge, Recipe, load_recipe
from lora_dpo.run_directory import RunDirectory
from lora_dpo.tokenization import ChatTokenizer
from lora_dpo.training import chat_tokenizer

ON_THE_BASE = ("reward", "implicit")
"""Kinds of judges that are adapters on the one base, where they name one."""


def make_judge(
    judge: Judge | Callable[..., Any],
    model: Model | None = None,
    chat: ChatTokenizer | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> JudgeProtocol:
    """The judge that a recipe names, or a Python function as one.

    model, chat: the one base, on which reward models and implicit rewards are computed, and its tokenizer;
    "implicit:RUN" loads the run's own base where none is given. What a judge puts on a base stays there;
    `judge_on` takes it off again. Raises RecipeError for options that can't be,
    ModelError and RunError for what can't be loaded.
    """
    if not isinstance(judge, Judge):
        return FunctionJudge(judge)
    if judge.kind == "function":
        return function_judge(judge.what)
    if judge.kind == "classifier":
        return ClassifierJudge(judge, say)
    if judge.kind == "endpoint":
        return EndpointJudge(judge)
    if judge.kind == "implicit":
        return _implicit(judge, model, chat, say)
    if model is None or chat is None:
        raise RecipeError(f"judge.of got {judge.of!r}: a reward model needs its base: name it with --base")
    return RewardJudge(judge, model, chat, say)


@contextmanager
def judge_on(
    judge: Judge | Callable[..., Any],
    model: Model | None = None,
    chat: ChatTokenizer | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[JudgeProtocol]:
    """`make_judge`, and what the judge puts on the base is off again afterwards: the next one finds the base
    as this one did.

    "reward:FOLDER" and "implicit:RUN" take a bare base, which is bare again after an error too; the judge is
    not to be used any more then. "implicit" takes the model as it is, and puts nothing there. Raises what
    `make_judge` raises, and ModelError where that base has adapters on.
    """
    if not isinstance(judge, Judge) or model is None or not (judge.what and judge.kind in ON_THE_BASE):
        yield make_judge(judge, model, chat, say=say)
        return
    check_bare(model)
    try:
        yield make_judge(judge, model, chat, say=say)
    finally:
        bare(model)


def _implicit(
    judge: Judge, model: Model | None, chat: ChatTokenizer | None, say: Callable[[str], None]
) -> JudgeProtocol:
    """Of the model as it is; or of a run, whose adapter is put on the base that is given, or on its own."""
    beta = judge.beta
    if judge.what:
        run = RunDirectory.open(judge.what)
        recipe = load_recipe(run.recipe_file)
        beta = beta if beta is not None else _beta(recipe)
        if model is None:
            finished = open_finished(judge.what, need_data=False)
            model, chat = finished.model, finished.data.tokenizer
        else:
            model, chat = _with_adapter(judge, run, recipe, model)
    if model is None or chat is None:
        raise RecipeError("judge.of=implicit needs a model with an adapter: name a run, as implicit:RUN")
    return ImplicitJudge(
        model,
        chat,
        beta=BETA if beta is None else beta,
        per_token=judge.per_token,
        tokens_per_microbatch=judge.tokens_per_microbatch,
        say=say,
    )


def _with_adapter(
    judge: Judge, run: RunDirectory, recipe: Recipe, model: Model
) -> tuple[Model, ChatTokenizer]:
    """A run's adapter on a bare base, and the tokenizer with the run's template."""
    if isinstance(model.network, PeftModel):
        raise ModelError(
            f"judge.of got {judge.of!r}, but the base holds another policy already: judge.of=implicit takes"
            " that one, and a bare base, or none, takes the run's"
        )
    loaded = load_adapter(model, str(run.adapter_folder), reference=reference_of(run, recipe))
    return loaded, chat_tokenizer(model.tokenizer, recipe.data)


def _beta(recipe: Recipe) -> float | None:
    """The run's β, where its objective has one."""
    beta = getattr(recipe.loss, "beta", None)
    return float(beta) if isinstance(beta, (int, float)) and beta > 0 else None


def base_of(judge: Judge) -> Path | None:
    """The run whose recipe names the base of a reward model; None for what is no run."""
    if judge.kind != "reward":
        return None
    folder = Path(judge.what).expanduser()
    found = [place for place in (folder, folder.parent) if (place / "recipe.yaml").is_file()]
    return found[0] if found else None
