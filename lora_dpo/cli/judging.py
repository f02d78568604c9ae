"""`lora-dpo reward score` and `lora-dpo pair`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lora_dpo.cli.app import app
from lora_dpo.cli.reward import reward_app

if TYPE_CHECKING:
    from lora_dpo.model import Model
    from lora_dpo.recipe import Data, Judge
    from lora_dpo.tokenization import ChatTokenizer
    from lora_dpo.training import Display

TAKES_KEYS = {"allow_extra_args": True}
READS = ("format", "max_rows", "on_bad_row")
"""The keys of `Data` that say how pairs to judge are read."""

Part = TypeVar("Part")


@reward_app.command("score", context_settings=TAKES_KEYS)
def score_command(
    context: typer.Context,
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="What `lora-dpo sample` wrote, or preference pairs.")
    ],
    judge: Annotated[str, typer.Option(metavar="SPEC", help="Who judges; see above.")],
    output: Annotated[
        Path | None, typer.Option(help="The judged file; goes on with one that was cut.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="RECIPE_OR_RUN", help="The base, for judges that run on it and name none."),
    ] = None,
) -> None:
    """Give every response a reward.

    SPEC is reward:FOLDER (a reward model), implicit:RUN (a run's implicit reward), classifier:MODEL (a
    sequence-classification model, a hub id or a folder), function:FILE.py:NAME (NAME(prompt, response) ->
    number; the file is run), or endpoint:URL (an OpenAI-compatible one, compares two by two).

    Keys of the judge can follow: lora-dpo reward score SAMPLES --judge endpoint:URL model=NAME timeout=30.

    Of samples a judged file is written, an ordinary preference file of ranked responses. Of preference pairs
    the judge's accuracy is printed, with a 95% bootstrap interval; data.on_bad_row=skip, data.format and
    data.max_rows say how they are read.
    """
    from lora_dpo.errors import RecipeError
    from lora_dpo.judging import judge_file, make_judge
    from lora_dpo.recipe import Judge
    from lora_dpo.training import Display

    display = Display()
    reading = [word for word in context.args if word.lstrip("-").startswith("data.")]
    chosen = with_keys(Judge, [word for word in context.args if word not in reading], of=judge)
    are_samples = _are_samples(samples)
    if are_samples and reading:
        raise RecipeError(
            f"{reading[0]!r} is for preference pairs, and {samples} holds samples: leave it out"
        )
    data = None if are_samples else _reading(reading, samples)
    if are_samples and output is None:
        raise RecipeError("--output names the judged file that is to be written")
    made = make_judge(chosen, *_base(chosen, base), say=display.say)
    if data is not None:
        _score_pairs(made, data, output, display)
        return
    assert output is not None
    done = judge_file(made, samples.expanduser(), output.expanduser(), display)
    display.say(
        f"{done.prompts:,} prompts, {done.responses:,} responses: mean reward {done.mean:.4f}, within a"
        f" prompt ± {done.spread:.4f}"
    )
    display.say(f"pair them: lora-dpo pair {output} --output PAIRS.jsonl")


@app.command("pair", context_settings=TAKES_KEYS)
def pair_command(
    context: typer.Context,
    judged: Annotated[Path, typer.Argument(metavar="JUDGED", help="What `lora-dpo reward score` wrote.")],
    output: Annotated[Path, typer.Option(help="The preference file; replaced if it is there.")],
) -> None:
    """Make preference pairs out of judged responses.

    Keys of the pairing can follow: strategy=best_worst, best_second_worst or best_random; min_margin=0.5;
    max_length_ratio=1.5; length_slack=0.1; keep_unfinished=true; seed=0.
    """
    from lora_dpo.judging import pair_file
    from lora_dpo.recipe import Pairing
    from lora_dpo.training import Display

    display = Display()
    made = pair_file(judged.expanduser(), output.expanduser(), with_keys(Pairing, context.args))
    for line in made.lines():
        display.say(line)


def with_keys(part: type[Part], words: Sequence[str], **given: Any) -> Part:
    """A section of the recipe out of `key=value` words; the section's own name may stand in front of a key.

    Raises RecipeError naming the key.
    """
    from lora_dpo.errors import RecipeError
    from lora_dpo.recipe.coerce import build

    section = str(getattr(part, "section", ""))
    values: dict[str, Any] = dict(given)
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().lstrip("-").removeprefix(f"{section}.")
        if not equals:
            raise RecipeError(f"{word!r} is no option: write key=value")
        values[key] = value
    return build(part, values, section)


def _are_samples(file: Path) -> bool:
    """Whether a file's first line holds a prompt's responses as `lora-dpo sample` writes them."""
    from lora_dpo.errors import DataError
    from lora_dpo.judging.files import is_samples

    if not file.expanduser().exists() and file.suffix:
        raise DataError(f"there is no file {file}")
    return is_samples(file.expanduser())


def _reading(words: Sequence[str], file: Path) -> Data:
    """How preference pairs are read. Raises RecipeError for keys that would change nothing of that."""
    from lora_dpo.errors import RecipeError
    from lora_dpo.recipe import Data

    for word in words:
        key = word.partition("=")[0].strip().lstrip("-")
        if key.removeprefix("data.") not in READS:
            takes = ", ".join(f"data.{name}" for name in READS)
            raise RecipeError(f"{key} changes nothing of how pairs are judged here: the keys are {takes}")
    return with_keys(Data, words, train=str(file))


def _base(judge: Judge, base: str | None) -> tuple[Model | None, ChatTokenizer | None]:
    """The one base, bare, for a judge that runs on it; a run's own where none is named."""
    from lora_dpo.errors import RecipeError
    from lora_dpo.judging.making import base_of
    from lora_dpo.model import load_model
    from lora_dpo.recipe import load_recipe
    from lora_dpo.training import chat_tokenizer

    if base is not None and judge.kind not in ("reward", "implicit"):
        raise RecipeError(f"--base: the judge {judge.of} does not run on a base")
    place = Path(base).expanduser() if base is not None else base_of(judge)
    if place is None:
        return None, None
    recipe = load_recipe(place / "recipe.yaml" if place.is_dir() else place)
    model = load_model(recipe.base)
    return model, chat_tokenizer(model.tokenizer, recipe.data)


def _score_pairs(judge: Any, data: Data, output: Path | None, display: Display) -> None:
    from lora_dpo.judging import judge_pairs
    from lora_dpo.preferences import describe_skipped, load_preferences

    loaded = load_preferences(data)
    for line in describe_skipped(loaded):
        display.say(line)
    found = judge_pairs(judge, loaded.train, output=output.expanduser() if output else None, display=display)
    if found.left_out:
        display.say(f"{found.left_out} pairs left out: a response has several turns, or tool calls")
    display.say(f"{found.pairs} pairs, mean with 95% bootstrap interval")
    display.say(f"  accuracy                 {found.accuracy}")
    display.say(f"  margin                   {found.margin}")
    display.say(f"  ties                     {found.ties}")
