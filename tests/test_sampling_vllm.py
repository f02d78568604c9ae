"""vLLM behind `sample`, on a stand-in of what of it is documented: what is asked, and what is made of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import pair_rows, small_tokenizer
from test_sampling import model_of

from lora_dpo.answering import answer_prompts
from lora_dpo.errors import ModelError, RecipeError, RunError
from lora_dpo.model import save_adapter
from lora_dpo.recipe import Base, Recipe, Sampling, to_yaml
from lora_dpo.sampling import VLLM, Response, sample, sampler_id, vllm, vllm_never
from lora_dpo.training import Display, train

PROMPTS = [[5, 6, 7], [8] * 15, [9, 10]]
KEYS = ["a", "b", "c"]


class FakeVLLM:
    """It "answers" with tokens that depend on the request's seed alone."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.requests: list[tuple[Any, Any, Any]] = []
        self.fails: Exception | None = None

    def SamplingParams(  # noqa: N802
        self,
        *,
        n: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
        stop_token_ids: list[int],
        ignore_eos: bool,
        detokenize: bool,
        logit_bias: dict[int, float] | None,
    ) -> Any:
        assert n == 1 and 0 <= seed < 2**63 and max_tokens >= 1 and ignore_eos and not detokenize
        assert 0.01 <= temperature <= 2 and all(-100 <= value <= 100 for value in (logit_bias or {}).values())
        return SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})

    def LLM(self, **options: Any) -> FakeVLLM:  # noqa: N802
        if self.fails is not None:
            raise self.fails
        assert options.get("max_lora_rank", 8) in vllm.VLLM_RANKS
        self.made.append(options)
        return self

    def generate(self, prompts: Any, parameters: Any, *, use_tqdm: bool, lora_request: Any = None) -> Any:
        assert lora_request is None or self.made[-1]["enable_lora"]
        self.requests += [(p, how, lora_request) for p, how in zip(prompts, parameters, strict=True)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.answer(h))]) for h in parameters]

    def answer(self, how: Any) -> tuple[int, ...]:
        """The stop token is its last one."""
        ids = np.random.default_rng(how.seed).integers(0, 6, how.max_tokens).tolist()
        ends = [n for n, token in enumerate(ids) if token in how.stop_token_ids]
        return tuple(ids[: ends[0] + 1] if ends else ids)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    made = FakeVLLM()
    request = SimpleNamespace(LoRARequest=lambda *words: words)
    modules = {"vllm": made, "vllm.lora": SimpleNamespace(request=request), "vllm.lora.request": request}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rank 4."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model_of(), folder)
    return folder


def settings(**changes: Any) -> Sampling:
    return Sampling(**{"responses": 3, "max_new_tokens": 12} | changes)


def drawn(model: VLLM, prompts: Any = PROMPTS, how: Sampling | None = None, **more: Any) -> Any:
    return sample(model, prompts, how or settings(), **{"stop_ids": [2], "keys": KEYS[: len(prompts)]} | more)


def test_it_is_asked_for_the_same_and_gives_the_same_types(fake: FakeVLLM, adapter: Path, monkeypatch):
    monkeypatch.setattr(vllm, "PROMPTS_AT_ONCE", 2)
    model = VLLM(Base("org/model"), str(adapter), tokens=20, never=(7, 90))
    told: list[Any] = []
    counted: list[int] = []
    wanted = settings(temperature=0.7, top_p=0.9)
    made = drawn(model, how=wanted, done=lambda n, row: told.append((n, row)), progress=counted.append)
    assert told == list(enumerate(made)) and [len(row) for row in made] == [3, 3, 3] and counted == [2, 1]
    [options] = fake.made
    assert (options["model"], options["quantization"], options["max_model_len"]) == (
        "org/model", "bitsandbytes", 20)  # fmt: skip
    assert (options["enable_lora"], options["max_lora_rank"]) == (True, 8)
    assert options["generation_config"] == "vllm" and options["enable_prefix_caching"]
    for place, (prompt, how, lora) in enumerate(fake.requests):
        n, k = divmod(place, 3)
        assert prompt == {"prompt_token_ids": PROMPTS[n]} and lora[2] == str(adapter)
        assert (how.temperature, how.top_p, how.stop_token_ids) == (0.7, 0.9, [2])
        assert how.max_tokens == min(12, 20 - len(PROMPTS[n])) and how.logit_bias == {7: -100.0, 90: -100.0}
        ids = list(fake.answer(how))
        assert made[n][k] == (Response(ids[:-1], True) if ids[-1] == 2 else Response(ids, False))
        assert made[n][k].stop == (2 if made[n][k].finished else None)
    assert {r.finished for row in made for r in row} == {True, False}


def test_a_seed_is_a_function_of_seed_key_and_response_alone(fake: FakeVLLM):
    model = VLLM(Base("org/model"), tokens=40)
    everything = drawn(model, role="base")
    seeds = [how.seed for _, how, _ in fake.requests]
    assert len(set(seeds)) == 9
    backwards = sample(model, PROMPTS[::-1], settings(), stop_ids=[2], keys=KEYS[::-1], role="base")
    assert backwards == everything[::-1]
    fewer = drawn(model, how=settings(responses=2), role="base")
    assert fewer == [row[:2] for row in everything]
    drawn(model, how=settings(seed=1), role="base")
    assert not set(seeds) & {how.seed for _, how, _ in fake.requests[-9:]}
    # By its ids, where a prompt has no key.
    named = sample(model, [PROMPTS[0], PROMPTS[0]], settings(), stop_ids=[2], role="base")
    assert named[0] == named[1] != everything[0]


def test_what_is_known_is_not_asked_again(fake: FakeVLLM):
    model = VLLM(Base("org/model"), tokens=40)
    everything = drawn(model, role="base")
    asked, told = len(fake.requests), []
    rest = drawn(model, role="base", known={0, 2}, done=lambda n, row: told.append(n))
    assert rest == [[], everything[1], []] and told == [1] and len(fake.requests) == asked + 3
    fake.made.clear()
    assert drawn(VLLM(Base("org/model"), tokens=40), role="base", known={0, 1, 2}) == [[], [], []]
    assert not fake.made  # minutes of starting, for nothing


def test_another_adapter_goes_on_with_the_engine_and_is_never_taken_for_the_first(
    fake: FakeVLLM, adapter: Path, tmp_path: Path
):
    """Even in the same folder: vLLM knows adapters by the number that it is given."""
    folder = tmp_path / "adapter"
    save_adapter(model_of(), folder)
    one = VLLM(Base("org/model"), str(folder), tokens=40)
    drawn(one)
    before = one.sampler_id(settings(), [2])
    other = model_of()
    next(iter(other.trainable.values())).data += 1
    save_adapter(other, folder)
    drawn(one)
    drawn(dataclasses.replace(one, adapter=str(adapter)))
    drawn(one, role="base")
    assert len(fake.made) == 1
    first, second, third, base = (fake.requests[at][2] for at in (0, 9, 18, 27))
    assert len({first[1], second[1]}) == 2 and first[:2] == third[:2] and base is None
    assert first[0] != second[0] and 0 < first[1] < 2**31
    assert one.sampler_id(settings(), [2]) != before
    drawn(dataclasses.replace(one, tokens=50))
    assert len(fake.made) == 2 and fake.made[1]["max_model_len"] == 50


def test_the_sampler_is_vllm_its_base_its_adapter_and_what_was_set(adapter: Path):
    model = VLLM(Base("org/model"), str(adapter))
    usual = model.sampler_id(settings(), [2])
    assert len(usual) == 16 and usual == model.sampler_id(settings(tokens_in_cache=5), [2])
    others = {
        model.sampler_id(settings(), [2], role="base"),
        model.sampler_id(settings(), [3]),
        model.sampler_id(settings(seed=1), [2]),
        VLLM(Base("org/other"), str(adapter)).sampler_id(settings(), [2]),
        VLLM(Base("org/model", quantization="none"), str(adapter)).sampler_id(settings(), [2]),
        sampler_id(model_of(), settings(), [2]),
    }
    assert len(others) == 6 and usual not in others


def test_tokens_that_a_model_in_memory_does_not_draw_are_not_drawn():
    """Padding, and rows of the head beyond the tokenizer."""
    tokenizer = small_tokenizer()
    assert vllm_never(tokenizer, len(tokenizer) + 2, [2]) == (0, len(tokenizer), len(tokenizer) + 1)
    assert vllm_never(tokenizer, len(tokenizer), [0]) == ()
    assert vllm_never(None, 9, [2]) == ()


def changed(adapter: Path, folder: Path, **values: Any) -> str:
    """A copy with other values in its config."""
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return str(folder)


def test_what_vllm_cannot_do_is_refused_in_words(fake: FakeVLLM, adapter: Path, tmp_path: Path):
    base = Base("org/model")
    model = VLLM(base, tokens=20)
    with pytest.raises(ModelError, match="no adapter"):
        drawn(model)
    with pytest.raises(ModelError, match="not as reference"):
        drawn(model, role="reference")
    with pytest.raises(RunError, match=r"prompt 1 \(\w{16}\) has 20 tokens; between 1 and 19 fit"):
        sample(model, [[3] * 20], settings(), stop_ids=[2], role="base")
    with pytest.raises(RunError, match=r"prompt 1 \(a\) has 0 tokens"):
        drawn(model, [[]], role="base")
    for temperature in (0.001, 2.5):
        with pytest.raises(RecipeError, match=r"sampling.temperature got .*vLLM takes 0.01 to 2"):
            drawn(model, how=settings(temperature=temperature), role="base")
    for other in (Base("m", quantization="int8"), Base("m", double_quantization=False)):
        with pytest.raises(ModelError, match=r"base.quantization=.* vLLM quantizes to nf4 with double"):
            drawn(VLLM(other), role="base")
    for name, values in {"dora": {"use_dora": True}, "pattern": {"alpha_pattern": {"q_proj": 2}}}.items():
        wrong = changed(adapter, tmp_path / name, **values)
        with pytest.raises(ModelError, match=rf"cannot answer .* it has {next(iter(values))}\. Sample from"):
            drawn(VLLM(base, wrong))
    with pytest.raises(ModelError, match="takes a local folder"):
        drawn(VLLM(base, str(tmp_path / "none")))
    fake.fails = ValueError("Free memory on device is less than desired")
    with pytest.raises(ModelError, match=r"vLLM does not start on org/model \(ValueError: Free memory"):
        drawn(model, role="base")
    assert not fake.made and not fake.requests


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"pip install 'lora-dpo\[vllm\]'"):
        drawn(VLLM(Base("org/model")), role="base")


def test_the_command_draws_by_vllm_into_a_file_of_the_same_form(
    fake: FakeVLLM, recipe: Recipe, tmp_path: Path, monkeypatch
):
    train(recipe, quiet=True)
    monkeypatch.setattr("lora_dpo.answering.load_model", None)  # no second copy of the base
    prompts = tmp_path / "some.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(5)))
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(to_yaml(recipe))
    keys, run = ["responses=2", "max_new_tokens=8"], Path(recipe.run_directory)
    samplers = []
    for source, options in ((run, {}), (run, {"base_only": True}), (recipe_file, {})):
        file = tmp_path / f"{len(samplers)}.jsonl"
        more: dict[str, Any] = {"words": keys, "vllm": True, "display": Display(quiet=True), **options}
        counts = answer_prompts(source, str(prompts), file, **more)
        assert (counts.prompts, counts.responses) == (5, 10)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [len(line["responses"]) for line in lines] == [2] * 5
        assert answer_prompts(source, str(prompts), file, **more).known == 5
        samplers.append(lines[0]["sampler"])
    assert [request[2] is None for request in fake.requests] == [False] * 10 + [True] * 20
    assert samplers[0] != samplers[1] == samplers[2]
    assert {options["dtype"] for options in fake.made} == {recipe.base.compute_dtype}
