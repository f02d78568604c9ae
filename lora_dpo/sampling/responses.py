"""Several responses to each prompt, drawn at random: what the rest of the library calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from lora_dpo.errors import RunError
from lora_dpo.model import Model, generating
from lora_dpo.out_of_memory import give_back_memory, is_out_of_memory
from lora_dpo.recipe import Sampling
from lora_dpo.sampling.choosing import Chooser, never_drawn
from lora_dpo.sampling.decoding import Engine, NotANumberError, Response, respond
from lora_dpo.sampling.greedy import ROLES, Role
from lora_dpo.sampling.noise import prompt_key, uniforms
from lora_dpo.sampling.own_cache import Again, OwnCache, has_own_cache
from lora_dpo.sampling.shared_prompts import SharedPrompts, can_share_prompts
from lora_dpo.sampling.vllm import VLLM
from lora_dpo.sampling.waves import Wave, must_be_alike, rows_at_once, tokens_in_cache, waves

Say = Callable[[str], None]
Done = Callable[[int, list[Response]], None]


def sample(
    model: Model | VLLM,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    *,
    stop_ids: Sequence[int],
    role: Role = "policy",
    keys: Sequence[str] | None = None,
    known: Collection[int] = (),
    done: Done | None = None,
    progress: Callable[[int], None] | None = None,
    say: Say = lambda line: None,
) -> list[list[Response]]:
    """`settings.responses` responses to each prompt.

    model: in memory; or a `VLLM`, whose promises are its own.
    prompts: token ids, each ending where the response begins. role: who answers. keys: a name for each prompt
    (a hash of its ids by default): the noise of a token is a function of (seed, key, which response, which
    token) alone. known: places of prompts that were answered before; nothing is returned or told of them.
    done: called with a prompt's place and responses when they are there. progress: with how many more
    prompts are done. torch's random state stays as it is.

    Prompts are answered in waves, which are a function of their lengths and of what was set. A wave of known
    prompts is passed over; in any other one they are answered too, so that on a CPU the new ones are to the
    bit what they would have been. Where memory runs out a wave is halved, which is said, and may move a
    result by rounding. Raises RunError for a prompt that is empty or fills the model's context, and for
    logits that are no numbers.
    """
    if isinstance(model, VLLM):
        return model.draw(
            prompts,
            settings,
            stop_ids=stop_ids,
            role=role,
            keys=keys,
            known=known,
            done=done,
            progress=progress,
        )
    names = [prompt_key(ids) for ids in prompts] if keys is None else list(keys)
    job = _Job(model, prompts, names, settings, tuple(stop_ids), say)
    job.check()
    made: list[list[Response]] = [[] for _ in prompts]
    with generating(model), ROLES[role](model):
        for wave in plan(model, [len(ids) for ids in prompts], settings):
            new = [n for n in wave.prompts if n not in known]
            if not new:
                continue
            answers = dict(zip(wave.prompts, job.answer(wave.prompts), strict=True))
            for n in new:
                made[n] = answers[n]
                (done or _nobody)(n, answers[n])
            (progress or _nobody)(len(new))
    return made


def _nobody(*told: object) -> None:
    """Who is told where nobody is to be."""


def plan(model: Model, lengths: Sequence[int], settings: Sampling) -> list[Wave]:
    """The waves in which `sample` answers prompts of these lengths."""
    budget = settings.tokens_in_cache or tokens_in_cache(model)
    return waves(lengths, settings, budget, rows_at_once(model), alike=must_be_alike(model))


def engine_for(model: Model) -> Engine:
    """The fastest way of decoding that is right for the model."""
    if can_share_prompts(model):
        return SharedPrompts(model)
    return OwnCache(model) if has_own_cache(model) else Again(model)


@dataclass
class _Job:
    """What is the same for all waves. at_once: so many responses fit; None before memory ran out."""

    model: Model
    prompts: Sequence[Sequence[int]]
    keys: Sequence[str]
    settings: Sampling
    stop_ids: tuple[int, ...]
    say: Say
    at_once: int | None = None
    chooser: Chooser = field(init=False)

    def __post_init__(self) -> None:
        vocabulary, never = never_drawn(self.model.tokenizer, self.stop_ids)
        self.chooser = Chooser(self.settings.temperature, self.settings.top_p, vocabulary, never)

    def check(self) -> None:
        """Raise RunError for a prompt that can't be answered, before anything is computed."""
        for n, ids in enumerate(self.prompts):
            if not len(ids):
                raise RunError(f"prompt {n + 1} ({self.keys[n]}) has no tokens: there is nothing to answer")
            if self._room(n) < 1:
                raise RunError(
                    f"prompt {n + 1} ({self.keys[n]}) has {len(ids):,} tokens; the model's context of"
                    f" {self._context():,} leaves no room for a response: shorten it, or leave it out"
                )

    def answer(self, prompts: Sequence[int]) -> list[list[Response]]:
        """The responses to each, in as many pieces as memory asks for."""
        count = self.settings.responses
        made: list[list[Response]] = [[] for _ in prompts]
        pieces = [(range(len(prompts)), range(count))]
        while pieces:
            places, which = pieces.pop(0)
            if self.at_once is not None and len(places) * len(which) > max(1, self.at_once):
                pieces = _halves(places, which) + pieces
                continue
            found = self._try([prompts[place] for place in places], which)
            if found is None:
                pieces.insert(0, (places, which))
                continue
            for place, responses in zip(places, found, strict=True):
                made[place] += responses
        return made

    def _try(self, prompts: Sequence[int], which: range) -> list[list[Response]] | None:
        """None where memory ran out; `at_once` is halved. Raises RunError where nothing is left to halve."""
        try:
            return self._respond(prompts, which)
        except Exception as error:
            rows = len(prompts) * len(which)
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                raise RunError(
                    f"memory ran out over one response to prompt {prompts[0] + 1} ({self.keys[prompts[0]]},"
                    f" {len(self.prompts[prompts[0]]):,} tokens): lower sampling.max_new_tokens, or leave"
                    " that prompt out"
                ) from error
        give_back_memory()
        self.at_once = rows // 2
        self.say(f"memory ran out over {rows} responses at a time: from here on {self.at_once}")
        return None

    def _respond(self, prompts: Sequence[int], which: range) -> list[list[Response]]:
        rooms = [self._room(n) for n in prompts]
        names = [self.keys[n] for n in prompts for _ in which]
        noise = uniforms(self.settings.seed, names, [*which] * len(prompts), max(rooms))
        ids = [self.prompts[n] for n in prompts]
        try:
            return respond(engine_for(self.model), ids, len(which), noise, self.chooser, self.stop_ids, rooms)
        except NotANumberError as error:
            wrong = prompts[error.prompt]
        if len(prompts) > 1:
            # Through masked places of attention it reaches neighbours: whose it is, shows alone.
            for n in prompts:
                self._respond([n], which)
        raise RunError(
            f"the logits of a response to prompt {wrong + 1} ({self.keys[wrong]}) are no numbers: the model"
            " overflows there (base.compute_dtype=float32 shows whether it is the dtype)"
        )

    def _context(self) -> int | None:
        return getattr(self.model.causal.config.get_text_config(), "max_position_embeddings", None)

    def _room(self, n: int) -> int:
        """The most tokens of a response to the n-th prompt."""
        most, context = self.settings.max_new_tokens, self._context()
        return most if context is None else min(most, context - len(self.prompts[n]))


def _halves(places: range, which: range) -> list[tuple[range, range]]:
    """Half of the prompts each; of a single prompt half of the responses."""
    if len(places) > 1:
        middle = len(places) // 2
        return [(places[:middle], which), (places[middle:], which)]
    middle = len(which) // 2
    return [(places, which[:middle]), (places, which[middle:])]
