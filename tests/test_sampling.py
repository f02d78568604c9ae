"""Responses drawn at random: what noise is, which tokens it draws, and that batching changes neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import build, float64_throughout, llama_config, small_tokenizer, with_random_adapter
from test_architectures import ARCHITECTURES

from lora_dpo.errors import RecipeError, RunError
from lora_dpo.model import Model, add_adapter, generating
from lora_dpo.probe import Verdict
from lora_dpo.probe import verdict as probing
from lora_dpo.probe.small import small_models
from lora_dpo.recipe import Adapter, Sampling
from lora_dpo.sampling import ROLES, Response, greedy, prompt_key, responses, sample
from lora_dpo.sampling.choosing import NOT_A_NUMBER, Chooser, inverse, never_drawn, nucleus
from lora_dpo.sampling.noise import philox, uniforms
from lora_dpo.sampling.own_cache import Again, OwnCache
from lora_dpo.sampling.shared_prompts import SharedPrompts
from lora_dpo.sampling.waves import waves
from lora_dpo.ways import use_attention

STOP = 2


def model_of(config: Any = None, way: Any = "shared", seed: int = 0) -> Model:
    """A random float64 model with a random adapter."""
    torch.manual_seed(seed)
    network = build(config or llama_config()).double().requires_grad_(False)
    use_attention(network, way)
    model = Model(network, None, torch.float64, Verdict(way))  # pyright: ignore[reportArgumentType]
    return with_random_adapter(add_adapter(model, Adapter(rank=4)))


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of()


def prompts_of(*lengths: int, vocabulary: int = 60, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, n).tolist() for n in lengths]


# Noise


def test_the_noise_is_philox_as_published():
    """The known answers that come with Random123, of 10 rounds of Philox4x32."""
    answers = {
        (0, 0, 0, 0, 0, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (2**32 - 1,) * 6: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            "d16cfe09 94fdcceb 5001e420 24126ea1"
        ),
    }
    for (*counter, first, second), expected in answers.items():
        words = philox([np.array([word], dtype=np.uint64) for word in counter], (first, second))
        assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def test_a_number_depends_on_seed_prompt_response_and_token_alone():
    one = uniforms(3, ["a"], [5], 7)
    many = uniforms(3, ["b", "a", "a"], [0, 5, 6], 9)
    assert np.array_equal(many[1, :7], one[0])
    everything = np.concatenate([many.ravel(), uniforms(4, ["a"], [5], 7).ravel()])
    assert len(set(everything)) == len(everything)
    assert everything.min() >= 0 and everything.max() < 1


def test_the_numbers_are_uniform():
    numbers = uniforms(0, [f"prompt {n}" for n in range(200) for _ in range(4)], [*range(4)] * 200, 50)
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 104  # chi-square, 63 degrees: 99.9%
    # Neither along tokens nor along responses does one number tell the next.
    for a, b in ((numbers[:, :-1], numbers[:, 1:]), (numbers[::4], numbers[1::4])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


# Choosing


def test_the_token_is_the_inverse_of_the_cumulated_distribution():
    """By a plain loop over exact fractions, vocabularies shorter and longer than a part of the sum."""
    rng = np.random.default_rng(0)
    for vocabulary in (3, 256, 700):
        weights = rng.integers(0, 4, (40, vocabulary)).astype(np.float32)
        weights[:, -1] = 1
        numbers = rng.random(40)
        numbers[:3] = (0.0, 1 - 2.0**-53, 0.5)
        expected = []
        for row, number in zip(weights, numbers, strict=True):
            target, total = number * float(row.sum()), 0.0
            token = -1
            while total <= target:
                token += 1
                total += float(row[token])
            expected.append(token)
        found = inverse(torch.from_numpy(weights), torch.from_numpy(numbers))
        assert found.tolist() == expected


def test_what_has_no_probability_is_never_drawn_not_even_at_the_edges():
    weights = torch.zeros(2, 600)
    weights[:, 300] = 1e-30
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse(weights, edges).tolist() == [300, 300]


def test_frequencies_are_the_softmax():
    """Chi-square over 40,000 draws at two temperatures."""
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0, -3.0, 1.5, 0.3])
    numbers = torch.from_numpy(uniforms(1, ["x"], [0], 40_000)[0])
    for temperature in (1.0, 0.6):
        drawn = Chooser(temperature)(logits.expand(40_000, 7), numbers)
        expected = torch.softmax(logits.double() / temperature, 0) * 40_000
        counts = torch.bincount(drawn, minlength=7)
        assert ((counts - expected) ** 2 / expected).sum() < 22.5  # 6 degrees: 99.9%


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share():
    """Against a plain loop over the sorted probabilities; ties are taken by id, and one token at least."""
    rng = np.random.default_rng(2)
    for vocabulary in (5, 900):
        weights = rng.integers(1, 5, (30, vocabulary)).astype(np.float32)
        for top_p in (0.001, 0.3, 0.9, 0.999):
            kept = nucleus(torch.from_numpy(weights), top_p).numpy()
            for row, found in zip(weights, kept, strict=True):
                order = sorted(range(vocabulary), key=lambda token: (-row[token], token))
                wanted, total, expected = top_p * float(row.sum()), 0.0, set()
                for token in order:
                    expected.add(token)
                    total += float(row[token])
                    if total >= wanted:
                        break
                assert set(np.flatnonzero(found)) == expected


def test_top_p_looks_at_probabilities_after_temperature():
    """Of 0.5, 0.3, 0.2 a share of 0.6 takes two; at temperature 0.5 (0.66, 0.24, 0.11) one is enough."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert (Chooser(1.0, 0.6).weights(logits) > 0).sum() == 2
    assert (Chooser(0.5, 0.6).weights(logits) > 0).sum() == 1


def test_padding_and_rows_of_the_head_beyond_the_tokenizer_are_never_drawn():
    tokenizer = small_tokenizer()
    pad, stop = 0, 2
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (pad, stop)
    vocabulary, never = never_drawn(tokenizer, [stop])
    assert vocabulary == len(tokenizer) and never == (pad,)
    assert never_drawn(tokenizer, [pad])[1] == ()  # there it ends a turn
    logits = torch.zeros(2000, 340)
    logits[:, len(tokenizer) :] = 50
    logits[:, pad] = 50
    drawn = Chooser(1.0, 1.0, vocabulary, never)(logits, torch.from_numpy(uniforms(0, ["x"], [0], 2000)[0]))
    assert drawn.max() < len(tokenizer) and pad not in drawn
    assert len(set(drawn.tolist())) >= len(tokenizer) - 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_told(bad: float):
    logits = torch.zeros(2, 5)
    logits[1] = bad
    assert Chooser()(logits, torch.tensor([0.1, 0.1]).double()).tolist() == [0, NOT_A_NUMBER]


# Responses


def settings(**changes: Any) -> Sampling:
    return Sampling(**{"responses": 3, "max_new_tokens": 12} | changes)


def test_responses_do_not_depend_on_who_is_answered_with_them(model: Model):
    prompts = prompts_of(7, 30, 12, 12, 5, 21)
    together = sample(model, prompts, settings(), stop_ids=[STOP])
    in_twos = sample(model, prompts, settings(tokens_in_cache=260), stop_ids=[STOP])
    alone = [sample(model, [prompt], settings(), stop_ids=[STOP])[0] for prompt in prompts]
    backwards = sample(model, prompts[::-1], settings(), stop_ids=[STOP])[::-1]
    fewer = sample(model, prompts, settings(responses=2, max_new_tokens=5), stop_ids=[STOP])
    assert together == in_twos == alone == backwards
    for some, more in zip(fewer, together, strict=True):
        assert [r.ids for r in some] == [r.ids[:5] for r in more[:2]]
    assert len({tuple(r.ids) for row in together for r in row}) == 18
    assert sample(model, prompts, settings(seed=1), stop_ids=[STOP]) != together
    keyed = sample(model, prompts, settings(), stop_ids=[STOP], keys=["a"] * 6)
    assert keyed != together


def test_nearly_no_temperature_is_greedy(model: Model):
    prompts = prompts_of(9, 14, 14, 3)
    for role in ("policy", "base"):
        expected = greedy(model, prompts, stop_ids=[STOP], max_new_tokens=12, role=role)
        cold = sample(model, prompts, settings(temperature=1e-9), stop_ids=[STOP], role=role)
        for ids, row in zip(expected, cold, strict=True):
            assert [r.ids for r in row] == [ids] * 3


def plainly(model: Model, prompt: list[int], k: int, how: Sampling, stops: Any, role: str) -> Response:
    """The k-th response, each token from a forward pass over everything before, without a cache."""
    choose = Chooser(how.temperature, how.top_p)
    noise = torch.from_numpy(uniforms(how.seed, [prompt_key(prompt)], [k], how.max_new_tokens))[0]
    ids = list(prompt)
    for t in range(how.max_new_tokens):
        with generating(model), ROLES[role](model):  # pyright: ignore[reportArgumentType]
            logits = model.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1:]
        token = int(choose(logits, noise[t : t + 1]))
        if token in stops:
            return Response(ids[len(prompt) :], True)
        ids.append(token)
    return Response(ids[len(prompt) :], False)


EDGES = {
    "usual": ((6, 11), {"temperature": 0.8, "top_p": 0.9}),
    "prompts of one token": ((1, 1, 4), {}),
    "very different lengths": ((1, 300, 2, 80), {"max_new_tokens": 5}),
    "one response": ((9, 4, 17), {"responses": 1}),
    "one token": ((9, 1, 17), {"max_new_tokens": 1}),
    "one prompt, one response, one token": ((1,), {"responses": 1, "max_new_tokens": 1}),
    "nearly no top-p": ((9, 5), {"top_p": 1e-9}),
    "nearly no temperature": ((9, 5), {"temperature": 1e-300}),
    "a high temperature": ((9, 5), {"temperature": 50.0, "top_p": 0.5}),
    "more tokens than there is room for at first": ((3, 40), {"responses": 2, "max_new_tokens": 70}),
}


@pytest.mark.parametrize("role", ["policy", "base"])
@pytest.mark.parametrize("name", EDGES)
def test_a_response_is_drawn_token_by_token_from_the_models_own_distribution(
    model: Model, name: str, role: Any
):
    """Each token again, from a plain forward pass over prompt and response."""
    lengths, changes = EDGES[name]
    prompts, how = prompts_of(*lengths), settings(**changes)
    drawn = sample(model, prompts, how, stop_ids=[STOP], role=role)
    for prompt, row in zip(prompts, drawn, strict=True):
        assert len(row) == how.responses
        for k, response in enumerate(row[:2]):
            assert response == plainly(model, prompt, k, how, [STOP], role)


@pytest.mark.parametrize("changes", [{"top_p": 1e-9}, {"temperature": 1e-300}])
def test_nearly_no_top_p_or_temperature_leaves_the_likeliest_token(model: Model, changes: Any):
    prompts = prompts_of(1, 14, 3)
    expected = greedy(model, prompts, stop_ids=[STOP], max_new_tokens=12)
    drawn = sample(model, prompts, settings(**changes), stop_ids=[STOP])
    assert [[r.ids for r in row] for row in drawn] == [[ids] * 3 for ids in expected]


@pytest.mark.parametrize("name", ["mistral, window", "gpt2", "gpt_oss, sinks", "falcon, rotary", "bamba"])
def test_other_architectures_answer_alike_however_they_are_asked(name: str):
    """Prompts longer and shorter than the window, in waves of many and of one, in any order, and resumed."""
    way, config = ARCHITECTURES[name]
    with float64_throughout(), probing._quiet():
        torch.manual_seed(0)
        model = model_around(next(small_models(config())), way)
        prompts, how = prompts_of(7, 25, 1, 7, 12), settings(responses=2, max_new_tokens=6)
        together = sample(model, prompts, how, stop_ids=[STOP])
        alone = sample(model, prompts, settings(**vars(how) | {"tokens_in_cache": 1}), stop_ids=[STOP])
        order = [3, 0, 4, 2, 1]
        shuffled = sample(model, [prompts[n] for n in order], how, stop_ids=[STOP])
        rest = sample(model, prompts, how, stop_ids=[STOP], known={1, 3})
        assert together == alone
        assert [together[n] for n in order] == shuffled
        assert rest == [[] if n in (1, 3) else row for n, row in enumerate(together)]
        for n in (1, 2):
            assert together[n][1] == plainly(model, prompts[n], 1, how, [STOP], "policy")


def states(model: Model) -> Any:
    """What sampling must leave as it was."""
    return (
        torch.random.get_rng_state().tolist(),
        [module.training for module in model.causal.modules()],
        [(name, p.requires_grad) for name, p in model.causal.named_parameters()],
        model.causal.config._attn_implementation,
        [getattr(module, "active_adapters", None) for module in model.causal.modules()],
        [getattr(module, "disable_adapters", None) for module in model.causal.modules()],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_model_and_torchs_random_state_as_they_were(training: bool):
    """In every role, and where what is told of a prompt raises."""
    model = model_of()
    model.causal.train(training)
    torch.manual_seed(4)
    before = states(model)

    def refuse(*_: Any) -> None:
        raise OSError("no space left")

    for role in ("policy", "base", "reference", "policy"):
        sample(model, prompts_of(5, 9), settings(), stop_ids=[STOP], role=role)
        assert states(model) == before
        with pytest.raises(OSError, match="no space"):
            sample(model, prompts_of(5), settings(), stop_ids=[STOP], role=role, done=refuse)
        assert states(model) == before


def test_a_window_or_chunks_reach_no_further_in_long_responses():
    """Responses that leave the whole prompt behind the window."""
    for name in ("mistral, window", "llama4_text, chunks"):
        way, config = ARCHITECTURES[name]
        with float64_throughout(), probing._quiet():
            torch.manual_seed(0)
            model = model_around(next(small_models(config())), way)
            how = settings(responses=2, max_new_tokens=28)  # their context is 32
            prompts = prompts_of(3, 3, 2)
            for prompt, row in zip(prompts, sample(model, prompts, how, stop_ids=[]), strict=True):
                assert row[1] == plainly(model, prompt, 1, how, [], "policy")


def test_stop_tokens_end_a_response_and_are_left_out(model: Model):
    prompts = prompts_of(9, 9, 15)
    stops = list(range(0, 97, 12))
    drawn = sample(model, prompts, settings(responses=8), stop_ids=stops)
    unstopped = sample(model, prompts, settings(responses=8), stop_ids=[])
    ended = 0
    for row, whole in zip(drawn, unstopped, strict=True):
        for response, ids in zip(row, (r.ids for r in whole), strict=True):
            first = next((n for n, token in enumerate(ids) if token in stops), None)
            assert response == Response(ids[:first], first is not None)
            ended += response.finished
    assert 3 < ended < 24


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("llama", SharedPrompts),
        ("mistral, window", SharedPrompts),
        ("gemma2, softcap", SharedPrompts),
        ("gpt2", SharedPrompts),
        ("gpt_oss, sinks", SharedPrompts),
        ("deepseek_v3, MLA", SharedPrompts),
        ("llama4_text, chunks", OwnCache),
        ("falcon, rotary", OwnCache),
        ("mpt, alibi", OwnCache),
        ("bamba", OwnCache),
        ("recurrent_gemma", Again),
        ("doge, dynamic mask", Again),
    ],
)
def test_logits_of_shared_prompts_are_those_of_a_plain_forward_pass(name: str, engine: type):
    """To 1e-9 in float64, after repeating each prompt and leaving rows out twice."""
    way, config = ARCHITECTURES[name]
    with float64_throughout(), probing._quiet(), torch.no_grad():
        torch.manual_seed(0)
        model = model_around(next(small_models(config())), way)
        assert type(responses.engine_for(model)) is engine
        check_against_plain(model)


def model_around(network: Any, way: Any) -> Model:
    use_attention(network, way)
    model = Model(network, None, torch.float64, Verdict(way))  # pyright: ignore[reportArgumentType]
    return with_random_adapter(add_adapter(model, Adapter(rank=4)))


LEFT = {3: [1, 2, 4, 5], 5: [1]}
"""After which token which rows are kept."""


def check_against_plain(model: Model) -> None:
    alike = responses.must_be_alike(model)
    prompts = prompts_of(*((9, 9) if alike else (13, 5)))
    written = np.random.default_rng(1).integers(3, 60, (6, 7))
    engine = responses.engine_for(model)
    rows, seen = list(range(6)), []
    with generating(model):
        logits = engine.read(prompts).repeat_interleave(3, dim=0)
        engine.repeat(3)
        for t in range(7):
            for place, row in enumerate(rows):
                seen.append((prompts[row // 3] + written[row, :t].tolist(), logits[place]))
            if t in LEFT:
                engine.keep(torch.tensor(LEFT[t]))
                rows = [rows[place] for place in LEFT[t]]
            logits = engine.write(torch.from_numpy(written[rows, t]))
    use_attention(model.causal, "single")
    for ids, found in seen:
        expected = model.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert (found - expected).abs().max() <= 1e-9


def test_each_prompt_is_told_once_when_it_is_done(model: Model):
    told: list[tuple[int, list[Response]]] = []
    counted: list[int] = []
    prompts = prompts_of(7, 30, 12)
    made = sample(
        model,
        prompts,
        settings(tokens_in_cache=100),
        stop_ids=[STOP],
        done=lambda n, row: told.append((n, row)),
        progress=counted.append,
    )
    assert sorted(n for n, _ in told) == [0, 1, 2] and sum(counted) == 3
    assert all(made[n] == row for n, row in told)


def test_a_prompt_that_leaves_no_room_is_named(model: Model):
    small = model_of(llama_config(max_position_embeddings=16))
    made = sample(small, prompts_of(14, 6), settings(), stop_ids=[])
    assert [len(row[0].ids) for row in made] == [2, 10]
    with pytest.raises(RunError, match=r"prompt 2 \(\w{16}\) has 16 tokens; the model's context of 16"):
        sample(small, prompts_of(4, 16), settings(), stop_ids=[])
    with pytest.raises(RunError, match=r"prompt 1 \(one\) has no tokens"):
        sample(small, [[]], settings(), stop_ids=[], keys=["one"])


def test_logits_that_are_no_numbers_name_the_prompt():
    broken = model_of()
    broken.causal.get_input_embeddings().weight.data[5] = float("nan")  # pyright: ignore
    with pytest.raises(RunError, match=r"prompt 2 \(b\) are no numbers"):
        sample(broken, [[3, 4], [3, 5]], settings(), stop_ids=[], keys=["a", "b"], role="base")


def test_where_memory_runs_out_less_is_answered_at_a_time_and_the_same(model: Model, monkeypatch):
    prompts = prompts_of(7, 30, 12, 12)
    expected = sample(model, prompts, settings(), stop_ids=[STOP])
    genuine, sizes = responses.respond, []

    def narrow(engine: Any, prompts: Any, copies: int, *rest: Any):
        sizes.append(len(prompts) * copies)
        if sizes[-1] > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return genuine(engine, prompts, copies, *rest)

    monkeypatch.setattr(responses, "respond", narrow)
    monkeypatch.setattr(responses, "give_back_memory", lambda: None)  # a second, each time
    said: list[str] = []
    assert sample(model, prompts, settings(), stop_ids=[STOP], say=said.append) == expected
    assert sizes[:3] == [12, 6, 3] and max(sizes[3:]) <= 2
    assert said == [f"memory ran out over {n} responses at a time: from here on {n // 2}" for n in (12, 6, 3)]
    monkeypatch.setattr(responses, "respond", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RunError, match="one response to prompt 2 "):
        sample(model, prompts, settings(), stop_ids=[STOP])


def test_waves_fit_the_budget_and_the_longest_come_first():
    lengths = [5, 40, 12, 40, 7, 12]
    found = waves(lengths, settings(), 3 * (40 + 12) * 2, 64, alike=False)
    assert [wave.prompts for wave in found] == [(1, 3), (2, 5, 4, 0)]
    assert [w.prompts for w in waves(lengths, settings(), 1, 64, alike=False)] == [
        (1,), (3,), (2,), (5,), (4,), (0,)]  # fmt: skip
    assert [w.prompts for w in waves(lengths, settings(), 10**6, 6, alike=False)] == [(1, 3), (2, 5), (4, 0)]
    alike = waves(lengths, settings(), 10**6, 64, alike=True)
    assert [w.prompts for w in alike] == [(1, 3), (2, 5), (4,), (0,)]


@pytest.mark.parametrize("key", ["responses=0", "temperature=0", "top_p=0", "top_p=1.1", "max_new_tokens=0"])
def test_settings_that_make_no_sense_are_refused_by_key(key: str):
    name, _, value = key.partition("=")
    with pytest.raises(RecipeError, match=rf"sampling\.{name} got"):
        Sampling(**{name: value})  # pyright: ignore[reportArgumentType]
