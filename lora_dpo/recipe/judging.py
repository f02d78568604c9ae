"""Who judges responses, and how judged responses become pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from lora_dpo.bounds import AtLeast
from lora_dpo.errors import RecipeError
from lora_dpo.recipe.section import Count, CountOrZero, Fraction, NotNegative, Positive, Section

KINDS = ("reward", "implicit", "classifier", "function", "endpoint")


@dataclass(frozen=True)
class Judge(Section):
    """Where rewards come from.

    of: "reward:FOLDER" is a reward model on the base, trained by `lora-dpo reward train`. "implicit" is the
    implicit reward of the policy that is there, "implicit:RUN" that of a run. "classifier:MODEL" is a
    sequence-classification model, a hub id or a folder. "function:FILE.py:NAME" (or module:NAME) is a Python
    function, NAME(prompt, response) -> number, or NAME(prompts, responses) -> numbers for many at a time; its
    file is run, so it is as trusted as a script. "endpoint:URL" asks a language model behind an
    OpenAI-compatible URL which of two responses is better.

    beta: of an implicit reward; by itself the run's own, or 0.1. per_token: an implicit reward divided by the
    response's length in tokens.
    revision: a branch, tag or commit of a classifier's hub id. label: which of a classifier's several labels
    is good, by name or number. max_tokens: a classifier's longest conversation; longer ones lose their front.
    tokens_per_microbatch: tokens in memory at a time, for all that are models here; never changes a reward
    but by rounding.
    model: the endpoint's name for its model. api_key_env: the environment variable that holds its key.
    timeout: seconds for one answer. retries: how often a call that failed is made again. concurrency: calls
    under way at a time. opponents: how many others each response is compared with; by itself all of them, or
    4 where a prompt has more than 5 responses. max_invalid: the share of unusable answers above which judging
    stops. instruction: what makes a response better, in words, instead of a general helpfulness.
    """

    section: ClassVar[str] = "judge"
    of: str
    beta: Positive | None = None
    per_token: bool = False
    revision: str | None = None
    label: str | None = None
    max_tokens: Annotated[int, AtLeast(8)] | None = None
    tokens_per_microbatch: Count = 8192
    model: str | None = None
    api_key_env: str | None = None
    timeout: Annotated[float, AtLeast(0, high=3600, exclusive=True)] = 60.0
    retries: Annotated[int, AtLeast(0, high=100)] = 6
    concurrency: Annotated[int, AtLeast(1, high=256)] = 8
    opponents: Count | None = None
    max_invalid: Fraction = 0.1
    instruction: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS or (not self.what and self.kind != "implicit"):
            takes = "reward:FOLDER, implicit, implicit:RUN, classifier:MODEL, function:FILE.py:NAME or"
            raise RecipeError(f"judge.of got {self.of!r}; it takes {takes} endpoint:URL")
        if self.kind == "endpoint" and self.model is None:
            raise RecipeError("judge.of=endpoint:… needs judge.model, the endpoint's name for its model")

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.of.partition(":")[0]

    @property
    def what(self) -> str:
        """What stands after the kind: a folder, a model, a function, a URL; may be empty for implicit."""
        return self.of.partition(":")[2]


@dataclass(frozen=True)
class Pairing(Section):
    """How the judged responses of a prompt become a pair. The chosen one is always the best.

    strategy: which is rejected: the worst, the second-worst (the worst is often a degenerate one), or a
    random one of those that are worse by the margin.
    min_margin: rewards must differ by at least so much, and at all.
    max_length_ratio: the longer of the two has at most so many times the tokens of the other; only responses
    within that are considered.
    length_slack: a response whose reward is within so much of the strategy's pick is rejected in its place
    where its length is closer to the chosen one's.
    keep_unfinished: let a response that was cut at max_new_tokens be chosen.
    seed: of the random choice.
    """

    section: ClassVar[str] = "pairing"
    strategy: Literal["best_worst", "best_second_worst", "best_random"] = "best_worst"
    min_margin: NotNegative = 0.0
    max_length_ratio: Annotated[float, AtLeast(1)] | None = None
    length_slack: NotNegative = 0.0
    keep_unfinished: bool = False
    seed: CountOrZero = 0
