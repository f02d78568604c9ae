"""What the reference said is kept: found again when nothing it depends on changed, never found when anything
did, and no damage to the file changes or stops a run.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    CHATML,
    float64_model,
    llama_config,
    pair_rows,
    random_branches,
    save_small_model,
    with_random_adapter,
)
from safetensors.torch import load_file
from torch import Tensor

from lora_dpo.batching import collate, pack
from lora_dpo.evaluation import evaluate
from lora_dpo.finished import evaluate_run, open_finished
from lora_dpo.losses import DPO
from lora_dpo.model import Model, load_base, load_model, load_tokenizer
from lora_dpo.preferences import load_preferences
from lora_dpo.recipe import Adapter, Base, Data, Recipe, override
from lora_dpo.reference import (
    ReferenceCache,
    adapter_fingerprint,
    base_fingerprint,
    reference_identity,
    reference_logprobs,
)
from lora_dpo.run_directory import RunDirectory, cache_folder
from lora_dpo.tokenization import Branches, ChatTokenizer, tokenize
from lora_dpo.training import Record, preflight, step_gradient, train

DATABASE = Path(str(import_module("lora_dpo.reference.database").__file__))


def examples(count: int = 6) -> list[Branches]:
    rng = np.random.default_rng(0)
    return [random_branches(rng, 10 + n, (8, 5 + n), row=n + 1) for n in range(count)]


def base_of(folder: Path, quantization: str = "nf4", dtype: str = "float32", **more: Any) -> Base:
    return Base(str(folder), quantization=quantization, compute_dtype=dtype, **more)  # pyright: ignore


@pytest.fixture
def model(small_model: Path) -> Model:
    return with_random_adapter(load_model(base_of(small_model), Adapter(rank=4)))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each reference pass had that a cache asked for."""
    module = import_module("lora_dpo.reference.cache")
    counts: list[int] = []

    def counting(model: Model, batch: Any) -> Tensor:
        counts.append(len(batch.examples))
        return reference_logprobs(model, batch)

    monkeypatch.setattr(module, "reference_logprobs", counting)
    return counts


def fill(model: Model, items: list[Branches], *, tokens: int = 10_000) -> None:
    """Keep what the reference says of these."""
    with ReferenceCache.open(model) as cache:
        for batch in pack(items, tokens):
            cache.logprobs(model, batch)
        cache.commit()


def found(model: Model, items: list[Branches]) -> Tensor | None:
    """What a new process would read of these, without computing anything."""
    with ReferenceCache.open(model) as cache:
        return cache.peek(collate(items, range(len(items))))


def the_file() -> Path:
    (file,) = (cache_folder() / "reference").glob("*.sqlite")
    return file


# ---- it hits


def test_a_second_epoch_asks_the_reference_nothing_and_uses_the_same_values(
    model: Model, computed: list[int]
):
    items = examples()
    results = []
    for _ in range(2):
        with ReferenceCache.open(model) as cache:
            sums = step_gradient(model, DPO(), items, tokens_per_microbatch=60, seed=0, cache=cache)
            cache.commit()
            gradient = torch.cat([p.grad.flatten() for p in model.trainable.values()])  # pyright: ignore
            results.append((sums.loss, gradient, sums.metrics["reference_cache/hit_rate"].item()))
    assert sum(computed) == 6
    (loss, gradient, none), (loss_again, gradient_again, all_of_them) = results
    assert torch.equal(loss, loss_again) and torch.equal(gradient, gradient_again)
    assert (none, all_of_them) == (0, 6)
    without = step_gradient(model, DPO(), items, tokens_per_microbatch=60, seed=0)
    assert torch.equal(without.loss, loss), "what is kept is what the reference says"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_values_are_the_computed_ones_to_the_bit(small_model: Path, dtype: torch.dtype):
    double = dtype == torch.float64
    model = float64_model(llama_config()) if double else load_model(base_of(small_model), Adapter(rank=4))
    items = examples()
    fill(model, items)
    kept = found(model, items)
    assert kept is not None and kept.dtype == dtype
    # `pack` puts the longest first.
    by_length = sorted(range(len(items)), key=lambda n: -items[n].tokens)
    batch = collate([items[n] for n in by_length], range(len(items)))
    with ReferenceCache.open(model) as cache:
        again = cache.peek(batch)
    assert again is not None and torch.equal(again, reference_logprobs(model, batch))


def test_under_another_packing_kept_values_agree_to_rounding(model: Model):
    items = examples()
    fill(model, items, tokens=40)
    kept = found(model, items)
    fresh = reference_logprobs(model, collate(items, range(len(items))))
    assert kept is not None and (kept - fresh).abs().max() < 1e-5


def test_what_is_known_wins_over_what_is_computed_anew(model: Model, monkeypatch: pytest.MonkeyPatch):
    """A micro-batch with one unknown example is computed whole, and changes nothing of what is known."""
    items = examples(3)
    with monkeypatch.context() as patch:
        told_apart = import_module("lora_dpo.reference.cache")
        patch.setattr(told_apart, "reference_logprobs", lambda *given: reference_logprobs(*given) + 0.5)
        fill(model, items[:2])
    batch = collate(items, range(3))
    fresh = reference_logprobs(model, batch).split(batch.rows)
    with ReferenceCache.open(model) as cache:
        mixed = cache.logprobs(model, batch)
        cache.commit()
        assert cache.misses == 3, "read whole or computed whole"
        later = cache.peek(batch)
    assert torch.equal(mixed, torch.cat([fresh[0] + 0.5, fresh[1] + 0.5, fresh[2]]))
    assert later is not None and torch.equal(later, mixed)


def test_an_example_that_a_step_holds_twice_is_worth_the_same_both_times(model: Model, computed: list[int]):
    items = examples(3)
    with ReferenceCache.open(model) as cache:
        first = cache.logprobs(model, collate([items[0], items[1], items[0]], range(3)))
        rows = collate(items[:1], range(1)).rows[0]
        assert torch.equal(first[:rows], first[-rows:])
        again = cache.logprobs(model, collate([items[2], items[0]], range(2)))
        assert torch.equal(again[-rows:], first[:rows])
        only = cache.logprobs(model, collate([items[0]], range(1)))
        cache.commit()
    assert torch.equal(only, first[:rows]) and computed == [3, 2]
    kept = found(model, items[:1])
    assert kept is not None and torch.equal(kept, first[:rows])


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_base_is_the_same_with_an_adapter_on_it_after_training_and_when_loaded_again(
    small_model: Path, quantization: str
):
    base, items = base_of(small_model, quantization), examples()
    network = load_base(base)
    expected = base_fingerprint(Model(network, load_tokenizer(base), network.dtype))
    model = load_model(base, Adapter(rank=4))
    assert base_fingerprint(model) == expected
    before = reference_identity(model)
    optimizer = torch.optim.AdamW(list(model.trainable.values()), lr=1e-2)
    model.checkpoint_layers()
    for _ in range(2):
        step_gradient(model, DPO(), items, tokens_per_microbatch=100, seed=0)
        optimizer.step()
        evaluate(model, DPO(), items)
    assert base_fingerprint(model) == expected
    other = load_model(base, Adapter(rank=2, targets=("q_proj",)), seed=3)  # pyright: ignore
    assert reference_identity(other) == reference_identity(model) == before


# ---- it misses


def flip(tensor: Tensor) -> None:
    """The lowest bit of one element."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    flat[(len(flat) // 2) & ~3] ^= 1
    assert flat.data_ptr() == tensor.data_ptr(), "flipped in a copy"


def layer(model: Model) -> Any:
    return model.causal.model.layers[1]  # pyright: ignore


def in_memory(change: Callable[[Model], Any]) -> Callable[[Path, Path], Model]:
    def load(folder: Path, _: Path) -> Model:
        model = load_model(base_of(folder), Adapter(rank=4))
        change(model)
        return model

    return load


def loaded(**changes: Any) -> Callable[[Path, Path], Model]:
    return lambda folder, _: load_model(base_of(folder, **changes), Adapter(rank=4))


def configured(**changes: Any) -> Callable[[Path, Path], Model]:
    """The same weights under another config."""
    return lambda _, new: load_model(base_of(save_small_model(new, **changes)), Adapter(rank=4))


OTHER_REFERENCES: dict[str, Callable[[Path, Path], Model]] = {
    "a quantized weight": in_memory(lambda m: flip(layer(m).mlp.up_proj.base_layer.weight.data)),
    "a quantized weight's scales": in_memory(
        lambda m: flip(layer(m).self_attn.q_proj.base_layer.weight.quant_state.absmax)
    ),
    "the scales of its scales": in_memory(
        lambda m: flip(layer(m).self_attn.q_proj.base_layer.weight.quant_state.state2.absmax)
    ),
    "a norm": in_memory(lambda m: flip(layer(m).input_layernorm.weight)),
    "an embedding": in_memory(lambda m: flip(m.causal.get_input_embeddings().weight)),  # pyright: ignore
    "the head": in_memory(lambda m: flip(m.head.weight)),
    "a buffer": in_memory(lambda m: flip(m.causal.model.rotary_emb.inv_freq)),  # pyright: ignore
    "rms_norm_eps": configured(rms_norm_eps=1e-5),
    "rope_theta": configured(rope_parameters={"rope_theta": 20_000.0, "rope_type": "default"}),
    "the activation": configured(hidden_act="gelu"),
    "fp4": loaded(quantization="fp4"),
    "int8": loaded(quantization="int8"),
    "none": loaded(quantization="none"),
    "no double quantization": loaded(double_quantization=False),
    "bfloat16": loaded(dtype="bfloat16"),
    "the compute dtype alone": in_memory(lambda m: setattr(m, "compute_dtype", torch.bfloat16)),
}


@pytest.mark.parametrize("change", OTHER_REFERENCES.values(), ids=list(OTHER_REFERENCES))
def test_another_reference_never_finds_this_ones_values(
    small_model: Path, tmp_path: Path, change: Callable[[Path, Path], Model]
):
    items = examples(2)
    fill(load_model(base_of(small_model), Adapter(rank=4)), items)
    other = change(small_model, tmp_path / "other")
    with ReferenceCache.open(other) as cache:
        batch = collate(items, range(2))
        assert cache.peek(batch) is None and not cache.known(batch.keys)
        assert torch.equal(cache.logprobs(other, batch), reference_logprobs(other, batch))
        assert (cache.hits, cache.misses) == (0, 2)
    assert found(load_model(base_of(small_model), Adapter(rank=4)), items) is not None, "and this one does"


def test_int8_scales_belong_to_the_base(small_model: Path):
    model = load_model(base_of(small_model, "int8"), Adapter(rank=4))
    before = base_fingerprint(model)
    weight = layer(model).self_attn.q_proj.base_layer.weight
    flip(weight.SCB)
    assert base_fingerprint(model) != before


def test_an_adapter_as_the_reference_never_finds_the_bases_values(model: Model):
    items = examples(2)
    fill(model, items)
    tensors = {name: p.detach() for name, p in model.trainable.items()}
    prints = [adapter_fingerprint(tensors, {"r": 4})]
    flip(next(iter(tensors.values())))
    prints.append(adapter_fingerprint(tensors, {"r": 4}))
    for fingerprint in prints:
        with ReferenceCache.open(model, reference=fingerprint) as cache:
            assert cache.peek(collate(items, range(2))) is None
            cache.logprobs(model, collate(items, range(2)))
            cache.commit()
            assert cache.peek(collate(items, range(2))) is not None
    assert len(list((cache_folder() / "reference").glob("*.sqlite"))) == 3


def test_an_adapters_fingerprint_holds_what_computes_and_nothing_else():
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(3)}
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "k"], "revision": None}
    expected = adapter_fingerprint(tensors, config)
    same = config | {
        "lora_dropout": 0.1,
        "inference_mode": True,
        "target_modules": {"k", "q"},
        "revision": "x",
    }
    assert adapter_fingerprint(dict(reversed(tensors.items())), same) == expected
    for other in ({"lora_alpha": 16}, {"use_rslora": True}, {"target_modules": ["q"]}):
        assert adapter_fingerprint(tensors, config | other) != expected
    for name, tensor in {"a": torch.ones(3, 2), "b": torch.zeros(3, dtype=torch.float64)}.items():
        assert adapter_fingerprint(tensors | {name: tensor}, config) != expected


def with_mask(item: Branches) -> Branches:
    """One token fewer is scored, one more elsewhere: the number of rows stays."""
    mask = item.scored[1].copy()
    last = np.flatnonzero(mask)[-1]
    mask[[last, 3]] = mask[[3, last]]
    return replace(item, scored=(item.scored[0], mask))


def with_boundary(item: Branches) -> Branches:
    """The last shared token stored in each rest instead."""
    rests = tuple(np.concatenate([item.prefix[-1:], rest]) for rest in item.rests)
    return replace(item, prefix=item.prefix[:-1], rests=rests)


def with_token(item: Branches) -> Branches:
    rest = item.rests[0].copy()
    rest[2] += 1
    return replace(item, rests=(rest, item.rests[1]))


def with_other_rests(item: Branches) -> Branches:
    """The same tokens and masks one after another, cut elsewhere into rests."""
    cut = len(item.rests[0]) - 1
    rests = tuple(np.split(np.concatenate(item.rests), [cut]))
    scored = tuple(np.split(np.concatenate(item.scored), [len(item.prefix) + cut]))
    return replace(item, rests=rests, scored=scored)


OTHER_EXAMPLES: dict[str, Callable[[Branches], Branches]] = {
    "a token": with_token,
    "the scored mask only": with_mask,
    "the prefix's boundary": with_boundary,
    "the boundary between rests": with_other_rests,
    "sides swapped": lambda item: replace(item, rests=item.rests[::-1], scored=item.scored[::-1]),
}


@pytest.mark.parametrize("change", OTHER_EXAMPLES.values(), ids=list(OTHER_EXAMPLES))
def test_another_example_never_finds_this_ones_values(model: Model, change: Callable[[Branches], Branches]):
    item = examples(3)[2]
    fill(model, [item])
    assert found(model, [change(item)]) is None
    elsewhere = replace(item, where=replace(item.where, row=99))
    assert found(model, [elsewhere]) is not None, "where it came from is nothing to the reference"


@pytest.mark.parametrize(
    "change",
    [{"chat_template": CHATML.replace("\n", " ")}, {"max_tokens": 24}, {"max_prompt_tokens": 6}],
    ids=lambda change: next(iter(change)),
)
def test_another_template_or_truncation_misses(model: Model, tmp_path: Path, change: dict[str, Any]):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(4)))
    records = load_preferences(Data(str(rows))).train
    before, after = (
        tokenize(records, ChatTokenizer(model.tokenizer, **changed)).branches for changed in ({}, change)
    )
    fill(model, before)
    assert after, "nothing to compare"
    for item in after:
        assert found(model, [item]) is None
    assert found(model, before) is not None


def test_every_kind_of_tensor_is_seen_to_its_last_bit():
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8]

    def prints(changed: int | None) -> str:
        module = torch.nn.Module()
        for n, kind in enumerate(kinds):
            module.register_buffer(f"b{n}", torch.ones(5, 3).to(kind))
        module.register_buffer("scalar", torch.tensor(2.0))
        module.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        module.register_buffer("empty", torch.zeros(0))
        module.register_buffer("strided", torch.arange(6.0).view(2, 3).t())
        if changed is not None:
            tensor = list(module.buffers())[changed]
            tensor.copy_(tensor.float() * 0 + (tensor.float() == 0))
        return base_fingerprint(Model(module, None, torch.float32))  # pyright: ignore

    seen = [prints(None), *(prints(n) for n in range(len(kinds) + 2)), prints(len(kinds) + 3)]
    assert len(set(seen)) == len(seen) and prints(None) == seen[0]


# ---- the file


def test_a_flipped_byte_is_a_miss_and_is_mended(model: Model):
    items = examples(2)
    fill(model, items)
    expected = found(model, items)
    with sqlite3.connect(the_file()) as file:
        (value,) = file.execute("SELECT value FROM logprobs WHERE key = ?", (items[0].key,)).fetchone()
    file.close()
    content = bytearray(the_file().read_bytes())
    content[content.index(value) + 5] ^= 1
    the_file().write_bytes(content)
    assert found(model, items) is None and found(model, items[1:]) is not None
    # The same packing as at first: the same bits.
    fill(model, items)
    mended = found(model, items)
    assert mended is not None and expected is not None and torch.equal(mended, expected)


def test_a_value_of_another_length_is_a_miss_and_is_replaced(model: Model):
    database, item = import_module("lora_dpo.reference.database"), examples(1)[0]
    identity = reference_identity(model)
    file = cache_folder() / "reference" / f"{identity}.sqlite"
    opened, _ = database.open_database(file, identity)
    opened.write({item.key: b"1234"})
    opened.close()
    assert found(model, [item]) is None
    fill(model, [item])
    assert found(model, [item]) is not None


def garbage(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(5000))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: 2 * file.stat().st_size // 3])


def foreign(file: Path) -> None:
    file.unlink()
    other = sqlite3.connect(file)
    other.execute("CREATE TABLE logprobs (key, value, checksum)")
    other.commit()
    other.close()


def of_another_reference(file: Path) -> None:
    with sqlite3.connect(file) as other:
        other.execute("UPDATE identity SET identity = 'another'")
    other.close()


@pytest.mark.parametrize("damage", [garbage, truncated, foreign, of_another_reference])
def test_a_file_that_is_not_ours_is_set_aside(model: Model, damage: Callable[[Path], None]):
    items, lines = examples(40), []
    fill(model, items)
    damage(the_file())
    content = the_file().read_bytes()
    with ReferenceCache.open(model, say=lines.append) as cache:
        assert cache.on and not cache.known(item.key for item in items)
        batch = collate(items, range(40))
        assert torch.equal(cache.logprobs(model, batch), reference_logprobs(model, batch))
        cache.commit()
    assert len(lines) == 1 and "set aside" in lines[0]
    (aside,) = the_file().parent.glob("*.broken-1")
    assert aside.read_bytes() == content
    assert found(model, items) is not None


def test_without_a_place_to_keep_them_the_reference_is_computed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[int]
):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "a file"))
    lines: list[str] = []
    with ReferenceCache.open(model, say=lines.append) as cache:
        batch = collate(examples(2), range(2))
        for _ in range(2):
            assert torch.equal(cache.logprobs(model, batch), reference_logprobs(model, batch))
            cache.commit()
        assert not cache.on and cache.known(batch.keys) == set()
    assert computed == [2, 2]
    assert len(lines) == 1 and "off for this run" in lines[0]


def test_a_full_disk_switches_the_cache_off_and_leaves_the_file_whole(model: Model):
    items, lines = examples(40), []
    fill(model, items[:1])
    with ReferenceCache.open(model, say=lines.append) as cache:
        cache._database._connection.execute("PRAGMA max_page_count = 1")  # pyright: ignore
        cache.logprobs(model, collate(items, range(40)))
        cache.commit()
        assert not cache.on
        cache.logprobs(model, collate(items, range(40)))
        cache.commit()
    assert len(lines) == 1 and "full" in lines[0]
    assert found(model, items[:1]) is not None and found(model, items[1:2]) is None


def test_a_number_that_is_not_finite_is_never_kept(model: Model, monkeypatch: pytest.MonkeyPatch):
    module, items = import_module("lora_dpo.reference.cache"), examples(3)

    def poisoned(model: Model, batch: Any) -> Tensor:
        values = reference_logprobs(model, batch)
        values[batch.rows[0]] = float("nan")
        values[-1] = float("-inf")
        return values

    monkeypatch.setattr(module, "reference_logprobs", poisoned)
    with ReferenceCache.open(model) as cache:
        assert cache.logprobs(model, collate(items, range(3))).isnan().any()
        cache.commit()
    assert [found(model, [item]) is not None for item in items] == [True, False, False]


def test_a_step_that_ran_out_of_memory_leaves_nothing_of_its_attempt(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    step, module = import_module("lora_dpo.training.step"), import_module("lora_dpo.reference.cache")
    items, genuine, failed = examples(), step.batch_logprobs, []

    def marked(model: Model, batch: Any) -> Tensor:
        return reference_logprobs(model, batch) + (0.0 if failed else 1.0)

    def failing(model: Model, objective: Any, batch: Any, cache: Any, **more: Any) -> Any:
        result = genuine(model, objective, batch, cache, **more)
        if not failed and batch.examples[0] != 5:
            failed.append(batch.tokens)
            raise torch.OutOfMemoryError("simulated")
        return result

    monkeypatch.setattr(module, "reference_logprobs", marked)
    monkeypatch.setattr(step, "batch_logprobs", failing)
    with ReferenceCache.open(model) as cache:
        sums = step_gradient(model, DPO(), items, tokens_per_microbatch=70, seed=0, cache=cache)
        cache.commit()
        assert failed and sums.tokens_per_microbatch < 70
        for batch in pack(items, sums.tokens_per_microbatch):
            kept = cache.peek(batch)
            assert kept is not None and torch.equal(kept, reference_logprobs(model, batch))


def test_preflight_throws_away_values_that_a_fresh_computation_does_not_confirm(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    items, lines = examples(4), []

    def check() -> str:
        with ReferenceCache.open(model) as cache:
            preflight(
                model,
                DPO(),
                items[:2],
                examples_per_step=2,
                tokens_per_microbatch=200,
                fresh_adapter=False,
                cache=cache,
                held_out=items[2:],
                say=lines.append,
            )
        return next(line for line in lines[::-1] if line.startswith("reference base"))

    assert "0 of 4 examples" in check()
    fill(model, items[:3])
    assert "3 of 4 examples already in the cache (spot check: " in check()
    assert found(model, items[:3]) is not None
    with sqlite3.connect(the_file()) as file:
        file.execute("DELETE FROM logprobs")
    file.close()
    with monkeypatch.context() as patch:
        wrong = import_module("lora_dpo.reference.cache")
        patch.setattr(wrong, "reference_logprobs", lambda *given: reference_logprobs(*given) - 0.01)
        fill(model, items)
    assert "4 of 4 examples already in the cache, but 1.0e-02 nats a token" in check()
    assert found(model, items[:1]) is None


# Loaded by its path: a child process then starts without torch.
CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("database", sys.argv[1])
database = importlib.util.module_from_spec(spec)
spec.loader.exec_module(database)
file, first, count, per_step = Path(sys.argv[2]), *map(int, sys.argv[3:])
opened, wrong = database.open_database(file, "x")
assert wrong is None, wrong
for start in range(first, first + count, per_step):
    opened.write({n.to_bytes(16, "big"): n.to_bytes(8, "big") * 250 for n in range(start, start + per_step)})
    print(start, flush=True)
opened.close()
"""


def writer(file: Path, *numbers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(DATABASE), str(file), *map(str, numbers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def numbers_in(file: Path) -> list[int]:
    """Which numbers a file of `CHILD` holds; every row must be whole and what was written."""
    database = import_module("lora_dpo.reference.database")
    opened, wrong = database.open_database(file, "x")
    assert wrong is None
    keys = [key for (key,) in opened._connection.execute("SELECT key FROM logprobs")]
    values = opened.read(dict.fromkeys(keys, 2000))
    opened.close()
    assert values == {key: key[8:] * 250 for key in keys}
    return sorted(int.from_bytes(key, "big") for key in keys)


def test_a_process_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path):
    file, per_step, done = tmp_path / "it.sqlite", 20, 0
    for n, delay in enumerate([0.0, 0.013, 0.031, 0.07]):
        child = writer(file, 100_000 * n, 100_000, per_step)
        assert child.stdout is not None and child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        told = child.communicate()[0].split()
        numbers = numbers_in(file)
        assert len(numbers) % per_step == 0, "a step is written whole or not at all"
        last = int(told[-1]) if told else 100_000 * n
        assert set(range(100_000 * n, last + per_step)) <= set(numbers), "what was committed stays"
        assert len(numbers) > done
        done = len(numbers)


def test_two_processes_write_the_same_and_different_examples_at_once(tmp_path: Path):
    file = tmp_path / "it.sqlite"
    children = [writer(file, first, 1200, 10) for first in (0, 600)]
    for child in children:
        error = child.communicate()[1]
        assert child.returncode == 0, error
    assert numbers_in(file) == list(range(1800))


# ---- runs


def hit_rates(run: RunDirectory) -> list[float]:
    return [r["reference_cache/hit_rate"] for r in run.records() if r["kind"] == "step"]


def test_other_runs_on_the_same_base_and_pairs_compute_no_reference(
    recipe: Recipe, tmp_path: Path, computed: list[int], capsys: pytest.CaptureFixture[str]
):
    """Another β, learning rate, rank, seed or packing; the run's own evaluation, and a later one."""
    first = train(recipe)
    assert hit_rates(first) == [0.0] * 4 + [1.0] * 2, "32 pairs, 8 a step: the fifth step begins an epoch"
    assert sum(computed) == 40, "32 to train on, 8 held out"
    assert "0 of 40 examples already in the cache" in capsys.readouterr().out
    computed.clear()
    words = ["loss.beta=0.3", "training.learning_rate=1e-3", "adapter.rank=2", "training.seed=7"]
    words += ["training.tokens_per_microbatch=150", f"run_directory={tmp_path / 'other'}"]
    other = train(override(recipe, words))
    assert hit_rates(other) == [1.0] * 6
    assert "40 of 40 examples already in the cache (spot check: " in capsys.readouterr().out
    evaluate_run(open_finished(first.path))
    assert computed == []


@pytest.mark.parametrize("words", [["training.reference_cache=false"], ["loss=SFT"]], ids=" ".join)
def test_nothing_is_kept_where_it_is_not_wanted_or_nothing_asks_for_a_reference(
    recipe: Recipe, words: list[str]
):
    run = train(override(recipe, [*words, "training.max_steps=1"]), quiet=True)
    assert not (cache_folder() / "reference").exists()
    assert not any("reference_cache/hit_rate" in record for record in run.records())


@pytest.mark.parametrize(("pairs", "tokens", "crash_at"), [(24, 150, 2), (40, 300, 1)])
def test_a_run_killed_and_resumed_with_its_cache_ends_with_the_same_adapter_bit_for_bit(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: int, tokens: int, crash_at: int
):
    """24 of 32 pairs a step: the second step holds pairs of two epochs. 40: a step meets pairs twice."""
    words = [f"training.pairs_per_step={pairs}", "training.save_every=1", "training.eval_every=2"]
    recipe = override(recipe, [*words, f"training.tokens_per_microbatch={tokens}"])
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache of the whole"))
    whole = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache of the killed"))

    class Crash(Exception):
        pass

    def crash(record: Record) -> None:
        if record.kind == "step" and record.step == crash_at:
            raise Crash

    with pytest.raises(Crash):
        train(recipe, observers=[crash], quiet=True)
    resumed = train(recipe, resume=True, quiet=True)
    at = crash_at - 1
    assert hit_rates(whole)[at] < hit_rates(resumed)[at] == 1.0, (
        "the resumed run found more, or nothing is tested"
    )
    adapters = [load_file(run.adapter_folder / "adapter_model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_a_resumed_run_may_do_without_its_cache(recipe: Recipe):
    train(override(recipe, ["training.max_steps=1"]), quiet=True)
    words = ["training.max_steps=1", "training.reference_cache=false"]
    train(override(recipe, words), resume=True, quiet=True)


def test_a_broken_file_does_not_stop_a_run(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = override(recipe, ["training.max_steps=2"])
    first = train(recipe, quiet=True)
    garbage(the_file())
    again = train(override(recipe, [f"run_directory={tmp_path / 'again'}"]))
    assert "set aside" in capsys.readouterr().out
    losses = [[r["loss"] for r in run.records() if r["kind"] == "step"] for run in (first, again)]
    assert losses[0] == losses[1] and hit_rates(again) == [0.0, 0.0]
