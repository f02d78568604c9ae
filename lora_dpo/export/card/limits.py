"""What is not known of an export, and what its figures don't say: limitations that are true of this run."""

from __future__ import annotations

from lora_dpo.export.card.facts import Facts, mapping_of, number_of
from lora_dpo.export.card.markdown import bullets, code
from lora_dpo.recipe import Recipe


def limitations(facts: Facts) -> str:
    """The section about limitations."""
    said = [
        *(
            []
            if facts.recipe is None
            else [_where_measured(facts, facts.recipe), *_training(facts, facts.recipe)]
        ),
        _other_base(facts),
        "Not measured: benchmarks, safety, other languages and tasks than those of the data, and what people"
        " think of the answers.",
    ]
    return f"## Limitations\n\n{bullets([line for line in said if line])}"


def _where_measured(facts: Facts, recipe: Recipe) -> str:
    if facts.evaluation is None and facts.kept_evaluation is None:
        return "Nothing was measured on held-out examples."
    records = recipe.loss.records
    examples = None if facts.evaluation is None else facts.evaluation.get("examples")
    if facts.evaluation is None and facts.examples is not None:
        examples = facts.examples[1]
    count = f"{examples:,} {records}" if isinstance(examples, int) else f"held-out {records}"
    if facts.evaluation is not None and not facts.on_own_rows:
        return f"Measured on {count} only."
    where = (
        "of the sources that are named as held out"
        if recipe.data.eval
        else "of the same source as the training rows"
    )
    return f"Measured on {count} {where}: how it does on others is not known."


def _training(facts: Facts, recipe: Recipe) -> list[str]:
    """What follows from the objective and the data."""
    loss, said = recipe.loss, []
    if loss.needs.rewards:
        said.append(
            "Accuracy says how often it prefers the response that the data prefer. A policy that is optimized"
            " against it can fool it with what it never saw: look at what that policy really writes."
        )
    elif loss.records == "pairs":
        said.append(
            "Preference accuracy compares the likelihoods of given responses: it says whether pairs such as"
            " these were learned, not whether answers that the model writes itself are better."
        )
        said.append(
            "The responses in the data need not be what the model would say, and training sampled none of its"
            " own: away from them it may have shifted in ways that these figures don't show."
        )
    elif loss.records == "ratings":
        said.append(
            "Implicit rewards compare likelihoods of given responses, not answers that the model writes."
        )
    else:
        said.append(
            "The loss is the likelihood of given responses; it says little of the model's own answers."
        )
    change = _mean(facts, "logps/chosen_change")
    if change is not None and change < 0:
        said.append(
            f"The chosen responses became less likely, too, by {-change:.3f} nats on average against the"
            " reference: what is trained is the difference of both sides."
        )
    said.append(
        f"Prompt and response together were at most {recipe.data.max_tokens:,} tokens long in training."
    )
    return said


def _mean(facts: Facts, name: str) -> float | None:
    """A metric's mean, from the run's evaluation or else its metrics."""
    if facts.evaluation is not None:
        return number_of(mapping_of(mapping_of(facts.evaluation.get("metrics")).get(name)).get("mean"))
    return None if facts.kept_evaluation is None else number_of(facts.kept_evaluation.get(f"eval/{name}"))


def _other_base(facts: Facts) -> str:
    """What is not known of the same update on other weights."""
    if not facts.is_adapter:
        return "Quantizing these weights again may lose a part of the update; how much was not measured."
    if facts.quantization == "none":
        return ""
    return (
        f"The adapter was trained on the base in {code(facts.quantization)}. On the base in 16 bits, or"
        " quantized otherwise, it is another function, which was not measured here unless it says so above."
    )
