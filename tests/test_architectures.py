"""Every architecture runs in a way that is right for it, and the probe finds the cheapest one.

`pytest -s tests/test_architectures.py` prints the table: the way, and how far its token log-probs are from
one sequence at a time, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from builders import (
    build,
    float64_throughout,
    gradient,
    llama_config,
    pair_rows,
    random_branches,
    relative,
    small_tokenizer,
    with_random_adapter,
)

from lora_dpo.batching import StepSampler, Way, collate, cost, pack
from lora_dpo.logprobs import token_logprobs
from lora_dpo.losses import DPO, LogProbs
from lora_dpo.model import Model, add_adapter, as_reference, generating, load_model
from lora_dpo.probe import Verdict, judge, probe
from lora_dpo.probe import verdict as module
from lora_dpo.probe.small import shrunk, small_models
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training
from lora_dpo.training import train
from lora_dpo.training.data import prepare_data
from lora_dpo.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from lora_dpo.training.progress import Display
from lora_dpo.ways import own_attention, switching_lengths, use_attention

BASIC: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
MAMBA: dict[str, Any] = {"mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 8}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


def basic(**changes: Any) -> dict[str, Any]:
    return BASIC | changes


ARCHITECTURES: dict[str, tuple[Way, Callable[[], Any]]] = {
    "llama": ("shared", lambda: llama_config(vocab_size=64)),
    "qwen2, windows": (
        "shared",
        lambda: hf.Qwen2Config(**BASIC, use_sliding_window=True, sliding_window=300, max_window_layers=1),
    ),
    "mistral, window": ("shared", lambda: hf.MistralConfig(**BASIC, sliding_window=4096)),
    "gemma2, softcap": (
        "shared",
        lambda: hf.Gemma2Config(**BASIC, head_dim=16, sliding_window=4096, query_pre_attn_scalar=16),
    ),
    "gemma3_text": ("shared", lambda: hf.Gemma3TextConfig(**basic(num_hidden_layers=7), head_dim=16)),
    "gpt2": ("shared", lambda: hf.GPT2Config(**GPT)),
    "gpt_neox": ("shared", lambda: hf.GPTNeoXConfig(**BASIC)),
    "opt": ("shared", lambda: hf.OPTConfig(vocab_size=64, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
                                            num_attention_heads=4, word_embed_proj_dim=32)),
    "granite": ("shared", lambda: hf.GraniteConfig(**BASIC, attention_multiplier=0.1, logits_scaling=4.0)),
    "phi3": ("shared", lambda: hf.Phi3Config(**BASIC, sliding_window=2047)),
    "gpt_oss, sinks": (
        "shared",
        lambda: hf.GptOssConfig(**BASIC, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen3_moe": ("shared", lambda: hf.Qwen3MoeConfig(**BASIC, **EXPERTS, num_experts=8)),
    "deepseek_v3, MLA": (
        "shared",
        lambda: hf.DeepseekV3Config(**basic(num_key_value_heads=4), **EXPERTS, **MLA, n_routed_experts=8,
                                    n_group=2, topk_group=1, first_k_dense_replace=1),
    ),
    "llama4_text, chunks": (
        "shared",
        lambda: hf.Llama4TextConfig(**basic(num_hidden_layers=4), head_dim=16, intermediate_size_mlp=96,
                                    num_local_experts=4, attention_chunk_size=8192),
    ),
    "stablelm": ("shared by mask", lambda: hf.StableLmConfig(**BASIC)),
    "nemotron": ("shared by mask", lambda: hf.NemotronConfig(**BASIC)),
    "gptj": ("shared by mask", lambda: hf.GPTJConfig(**GPT, rotary_dim=8)),
    "falcon, rotary": (
        "shared by mask",
        lambda: hf.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    ),
    "gpt_neo, local": (
        "padded",
        lambda: hf.GPTNeoConfig(vocab_size=64, hidden_size=64, num_layers=2, num_heads=4,
                                intermediate_size=96, attention_types=[[["global", "local"], 1]],
                                max_position_embeddings=128),
    ),
    "doge, dynamic mask": ("single", lambda: hf.DogeConfig(**BASIC, keep_window_size=2048)),
    "mpt, alibi": ("padded", lambda: hf.MptConfig(vocab_size=64, d_model=64, n_heads=4, n_layers=2)),
    "bloom, alibi": ("padded", lambda: hf.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4)),
    "mamba2": (
        "padded",
        lambda: hf.Mamba2Config(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16,
                                state_size=16, n_groups=2, chunk_size=256),
    ),
    "bamba": (
        "padded",
        lambda: hf.BambaConfig(**BASIC, **MAMBA, mamba_n_groups=1, attn_layer_indices=[1]),
    ),
    "falcon_h1": (
        "padded",
        lambda: hf.FalconH1Config(**BASIC, **MAMBA, mamba_d_ssm=128, lm_head_multiplier=0.5),
    ),
    "jamba": (
        "padded",
        lambda: hf.JambaConfig(**BASIC, attn_layer_period=2, attn_layer_offset=1, num_experts=4,
                               use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4),
    ),
    "qwen3_next": (
        "padded",
        lambda: hf.Qwen3NextConfig(**basic(num_hidden_layers=4), **EXPERTS, head_dim=16, num_experts=4,
                                   shared_expert_intermediate_size=32, linear_num_value_heads=4,
                                   linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16),
    ),
    "lfm2": ("padded", lambda: hf.Lfm2Config(**BASIC, full_attn_idxs=[1])),
    "recurrent_gemma": (
        "padded",
        lambda: hf.RecurrentGemmaConfig(**basic(num_hidden_layers=3), lru_width=64,
                                        attention_window_size=2048),
    ),
}  # fmt: skip
GRADIENTS = (
    "gemma2, softcap",
    "gpt_oss, sinks",
    "llama4_text, chunks",
    "stablelm",
    "falcon, rotary",
    "mamba2",
    "bloom, alibi",
    "doge, dynamic mask",
)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    print("\n| architecture | way | off by | what was wrong with cheaper ways |\n| --- | --- | --- | --- |")
    print("\n".join(lines))


def adapted(network: hf.PreTrainedModel, verdict: Verdict) -> Model:
    """A float64 model with a random adapter, run as the verdict says."""
    use_attention(network, verdict.way)
    model = Model(network, None, torch.float64, verdict)  # pyright: ignore[reportArgumentType]
    return with_random_adapter(add_adapter(model, Adapter(rank=4)))


def one_at_a_time(model: Model, items: list) -> torch.Tensor:
    """Summed log-probs of each side [B, k] by the model's own attention and logits, each side by itself."""
    use_attention(model.causal, "single")
    sums = []
    for item in items:
        for side in range(item.sides):
            ids = torch.from_numpy(item.side(side).astype(np.int64))
            at = torch.from_numpy(np.flatnonzero(item.scored[side]))
            logits = model.network(input_ids=ids[None], use_cache=False).logits[0].double()
            sums.append(torch.log_softmax(logits, dim=-1)[at - 1, ids[at]].sum())
    use_attention(model.causal, model.way)
    return torch.stack(sums).view(len(items), -1)


def examples(count: int = 4) -> list:
    rng = np.random.default_rng(3)
    shapes = [(13, (9, 17)), (4, (3, 8)), (0, (6, 5)), (10, (0, 7))][:count]
    return [random_branches(rng, prefix, rests, vocabulary=64) for prefix, rests in shapes]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_probe_finds_the_way_and_it_is_exact_in_float64(name: str, table: list[str]):
    """Log-probs to 1e-9 from one sequence at a time, on other lengths than the probe's own."""
    expected, config = ARCHITECTURES[name]
    with float64_throughout(), module._quiet():
        network = next(small_models(config()))
        verdict = judge(network)
        # The whole model's own logits are the truth here, head and transforms included.
        model = adapted(network, verdict)
        items = examples()
        with torch.no_grad():
            alone = one_at_a_time(model, items)
            batch = collate(items, range(len(items)))
            way = batch.per_sequence(token_logprobs(model, batch))
        off = max((way - alone).abs().max().item(), verdict.difference or 0.0)
        table.append(f"| {name} | {verdict.way} | {off:.0e} | {verdict.reason} |")
    assert verdict.way == expected, verdict
    assert off <= 1e-9


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_gradient_of_the_adapters_is_that_of_one_sequence_at_a_time(name: str):
    """To 1e-8, relative, with a random B; one architecture a way, and the shared way's special cases."""
    way, config = ARCHITECTURES[name]
    weights = torch.tensor([[1.0, -0.7]], dtype=torch.float64)
    with float64_throughout(), module._quiet():
        model = adapted(next(small_models(config())), Verdict(way))
        items = examples()
        (one_at_a_time(model, items) * weights).sum().backward()
        expected = gradient(model)
        for batch in pack(items, 40, way):
            (batch.per_sequence(token_logprobs(model, batch)) * weights).sum().backward()
        assert expected.norm() > 1e-3
        assert relative(gradient(model), expected) <= 1e-8


@pytest.mark.parametrize("name", ["llama4_text, chunks", "stablelm", "mpt, alibi", "mamba2"])
def test_changing_one_rest_leaves_all_other_sequences_as_they_were_to_the_bit(name: str):
    way, config = ARCHITECTURES[name]
    with module._quiet(), torch.no_grad():
        network = next(small_models(config()))
        use_attention(network, way)
        model = Model(network, None, torch.float64, Verdict(way))  # pyright: ignore[reportArgumentType]
        batch = collate(examples(3), range(3))
        rest = (batch.layout.example == 1) & (batch.layout.branch == 2)
        before, after = (token_logprobs(model, b) for b in (batch, module._changed(batch, rest)))
    own = batch.sequences == 3
    assert torch.equal(before[~own], after[~own])
    assert (before[own] - after[own]).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["shared by mask", "packed", "packed by mask", "padded", "single"])
def test_every_way_is_exact_where_the_model_takes_it(way: Way):
    """Log-probs and gradients, also in the ways that no architecture above needs."""
    with float64_throughout(), module._quiet():
        model = adapted(next(small_models(llama_config())), Verdict(way))
        items = examples()
        alone = one_at_a_time(model, items)
        alone.sum().backward()
        expected = gradient(model)
        batch = collate(items, range(len(items)))
        found = batch.per_sequence(token_logprobs(model, batch))
        found.sum().backward()
    assert (found - alone).abs().max() <= 1e-9
    assert relative(gradient(model), expected) <= 1e-8


def test_buffers_for_so_many_positions_are_seen_by_the_probe():
    """GPT-Neo's causal mask is a buffer: a packed micro-batch is longer than it, a sequence never."""
    config = hf.GPTNeoConfig(max_position_embeddings=2048)
    assert shrunk(config, 16).max_position_embeddings == 32
    assert "RuntimeError" in judge(next(small_models(ARCHITECTURES["gpt_neo, local"][1]()))).reason


def test_a_window_and_a_chunk_are_seen_by_the_probe():
    """With the window cut out of the shared way, the probe takes another: shrinking made it bite."""
    config = hf.MistralConfig(**BASIC, sliding_window=4096)
    assert shrunk(config, 16).sliding_window < 12
    network = next(small_models(config))
    genuine = hf.AttentionInterface()["lora_dpo_branches"]

    def forgetful(*args: Any, sliding_window: int | None = None, **kwargs: Any):
        return genuine(*args, **kwargs)

    hf.AttentionInterface.register("lora_dpo_branches", forgetful)
    try:
        verdict = judge(network)
    finally:
        hf.AttentionInterface.register("lora_dpo_branches", genuine)
    assert verdict.way != "shared" and "shared: off by" in verdict.reason


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0,
         "original_max_position_embeddings": 24},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=["longrope", "dynamic"],
)  # fmt: skip
def test_frequencies_that_go_by_the_longest_position_do_so_sequence_by_sequence(rope: dict[str, Any]):
    """Sides on both sides of the length at which the rotary frequencies change, in one micro-batch."""
    longest = 24 if rope["rope_type"] == "dynamic" else 512
    config = llama_config(rope_parameters=rope | {"rope_theta": 1e4}, max_position_embeddings=longest)
    assert switching_lengths(config)[0][0] == 24 and not switching_lengths(llama_config())
    rng = np.random.default_rng(0)
    # In rising order: dynamic frequencies also remember the longest sequence so far.
    items = [random_branches(rng, 9, (5, 14)), random_branches(rng, 20, (12, 15))]
    with float64_throughout(), torch.no_grad():
        torch.manual_seed(0)
        model = adapted(build(config).double().requires_grad_(False), Verdict("shared"))
        batch = collate(items, range(2))
        found = batch.per_sequence(token_logprobs(model, batch))
        expected = one_at_a_time(model, items)
        long = collate(items[1:], [0])
        shared = long.per_sequence(token_logprobs(model, long)) - expected[1:]
    assert (found - expected).abs().max() <= 1e-9
    if rope["rope_type"] == "longrope":
        assert shared.abs().max() <= 1e-9


def test_micro_batches_are_packed_by_what_they_cost():
    """Shared: prefix + rests. Packed: the sides' lengths. Padded: rows × longest; within the budget."""
    items = examples()
    assert cost(items[:1], "shared") == 13 + 9 + 17
    assert cost(items[:1], "packed by mask") == cost(items[:1], "single") == 22 + 30
    assert cost(items[:1], "padded") == 2 * 30
    assert cost(items[:2], "padded") == 4 * 30
    for way in ("shared", "packed", "padded"):
        for budget in (1, 60, 120, 10_000):
            batches = list(pack(items, budget, way))
            assert sorted(n for batch in batches for n in batch.examples) == [0, 1, 2, 3]
            for batch in batches:
                spent = cost([items[n] for n in batch.examples], way)
                assert spent <= budget or len(batch.examples) == 1
        assert len(list(pack(items, 10_000, way))) == 1


def test_generating_restores_the_attention_of_the_way():
    for way in ("shared", "shared by mask", "padded"):
        network = build(hf.LlamaConfig(**BASIC))
        use_attention(network, way)
        before = network.config._attn_implementation
        with generating(Model(network, None, torch.float32, Verdict(way))):  # pyright: ignore
            assert network.config._attn_implementation == own_attention(network) == "sdpa"
        assert network.config._attn_implementation == before
        assert (before == "lora_dpo_branches") == (way == "shared")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the probe builds in this test, with a cache folder of its own."""
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path))
    genuine, seen = module.judge, []
    monkeypatch.setattr(module, "judge", lambda network: seen.append(network) or genuine(network))
    return seen


def test_probing_disturbs_neither_the_random_state_nor_the_default_dtype(builds: list[Any]):
    """Nor the config; and it says nothing."""
    config = llama_config(attention_dropout=0.1)
    said = config.to_dict()
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    assert probe(config).way == "shared" and builds
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.get_default_dtype() == torch.float32
    assert config.to_dict() == said


def test_a_verdict_is_kept_on_disk_and_probed_again_where_it_is_broken(
    builds: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = probe(llama_config())
    assert probe(llama_config()) == first and len(builds) == 1
    assert probe(llama_config(num_hidden_layers=3)).way == "shared" and len(builds) == 2
    kept = sorted((tmp_path / "probes").iterdir())
    assert len(kept) == 2
    for broken in ("", "{", "[]", '{"way": "by magic"}', '{"way": []}', "null", "\xff"):
        for file in kept:
            file.write_text(broken, encoding="latin-1")
        assert probe(llama_config()) == first, broken
    assert len(builds) == 2 + 7
    assert json.loads(module.cache_file(llama_config(), {}).read_text())["way"] == "shared"
    # Where nothing can be written, it is probed each time.
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "a file"))
    assert probe(llama_config()) == first == probe(llama_config()) and len(builds) == 11


def test_what_cannot_be_probed_is_padded_with_the_reason_and_never_guessed(builds: list[Any]):
    broken = llama_config(hidden_act="no_such_function")
    verdict = probe(broken)
    assert verdict.way == "padded" and "no_such_function" in verdict.reason and not builds
    dull = hf.LlamaConfig(**BASIC)
    network = next(small_models(dull))
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(ValueError, match="hardly looks"):
        judge(network)


def save_chat_model(folder: Path, config: Any) -> Path:
    tokenizer = small_tokenizer()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(3)
    build(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHAT: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
TRAINED = {
    "shared by mask": lambda: hf.StableLmConfig(**BASIC | CHAT, max_position_embeddings=512),
    "padded": lambda: hf.Mamba2Config(**CHAT, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16,
                                      state_size=16, n_groups=1, chunk_size=16),
}  # fmt: skip


@pytest.mark.parametrize("way", TRAINED)
def test_training_in_a_slower_way_is_training_one_sequence_at_a_time(way: str, tmp_path: Path):
    """Three steps of `train` against a loop that knows nothing of packing: losses equal to 1e-5."""
    folder = save_chat_model(tmp_path / "model", TRAINED[way]())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(12)))
    training = Training(pairs_per_step=4, tokens_per_microbatch=150, max_steps=3, learning_rate=1e-2)
    recipe = Recipe(
        Base(str(folder), quantization="none", compute_dtype="float32", device="cpu"),
        Data(str(rows), max_tokens=200),
        adapter=Adapter(rank=4),
        training=training,
        run_directory=str(tmp_path / "run"),
    )
    records: list[Any] = []
    train(recipe, observers=[records.append], quiet=True)
    losses = [record.metrics["loss"] for record in records if record.kind == "step"]

    model = load_model(recipe.base, recipe.adapter)
    assert model.way == way
    data = prepare_data(recipe.data, recipe.loss, model.tokenizer, seed=0, display=Display(quiet=True))
    sampler = StepSampler(len(data.train), training.pairs_per_step, training.seed)
    optimizer = make_optimizer(training, model.trainable)
    for step, loss in enumerate(losses):
        items = [data.train[n] for n in sampler.step(step)]
        with as_reference(model):
            reference = one_at_a_time(model, items)
        policy = one_at_a_time(model, items)
        lengths = torch.ones(policy.shape, dtype=torch.int64)
        expected = DPO()(LogProbs(policy, reference, lengths)).per_example.mean()
        assert abs(loss - expected.item()) <= 1e-5
        expected.backward()
        torch.nn.utils.clip_grad_norm_(list(model.trainable.values()), 1.0)
        set_learning_rate(optimizer, learning_rate(training, step, 3))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert len(losses) == 3 and losses[-1] < losses[0] - 1e-3
