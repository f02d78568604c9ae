"""The frozen side: the base, the adapter that training starts from, another one, or the policy of some steps
ago.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import pair_rows, random_branches, relative, save_small_model, with_random_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_dpo.batching import collate
from lora_dpo.errors import ModelError, PreflightError, RecipeError, RunError
from lora_dpo.evaluation import batch_logprobs
from lora_dpo.export import Options, export_merged, find_source
from lora_dpo.finished import evaluate_run, open_finished, side_by_side
from lora_dpo.losses import DPO
from lora_dpo.model import (
    REFERENCE,
    Model,
    adapter_tensors,
    as_base,
    load_base,
    load_model,
    sync_reference,
)
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Reference, Training, override
from lora_dpo.reference import ReferenceCache, base_fingerprint, reference_fingerprint, reference_logprobs
from lora_dpo.run_directory import RunDirectory, cache_folder
from lora_dpo.training import Record, preflight, step_gradient, train
from lora_dpo.training import start as start_module

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "saved modules": {"modules_to_save": ["lm_head", "model.norm", "embed_tokens"]},
    "trained tokens": {"trainable_token_indices": [5, 9, 40]},
    "LoRA on embeddings": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "DoRA": {"use_dora": True},
}
"""What an adapter that somebody made before may hold."""


def save_adapter_by_peft(
    folder: Path, base: Path, *, name: str = "default", seed: int = 0, dtype: str = "float32", **options: Any
) -> Path:
    """An adapter with random values, made and saved by peft alone."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    usual: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **usual | options)
    peft = get_peft_model(network, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    peft.to(getattr(torch, dtype)).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapters(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        kind: save_adapter_by_peft(folder / kind, small_model, **options) for kind, options in KINDS.items()
    }


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def branches(count: int = 6):
    rng = np.random.default_rng(0)
    return [random_branches(rng, 10 + n, (8, 5 + n), row=n + 1) for n in range(count)]


def whole(items: Any = None):
    items = branches() if items is None else items
    return collate(items, range(len(items)))


def base_of(folder: Path, quantization: str = "nf4", dtype: str = "float32") -> Base:
    return Base(str(folder), quantization=quantization, compute_dtype=dtype)  # pyright: ignore


def log_ratio(model: Model) -> Tensor:
    return batch_logprobs(model, DPO(), whole()).log_ratio


def train_some(model: Model, steps: int = 20, rate: float = 1e-3) -> None:
    items, optimizer = branches(), torch.optim.AdamW(list(model.trainable.values()), lr=rate)
    for _ in range(steps):
        step_gradient(model, DPO(), items, tokens_per_microbatch=100, seed=0)
        optimizer.step()


# ---- the adapter that training starts from


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("nf4", "bfloat16"), ("nf4", "float32"), ("int8", "bfloat16")]
)
def test_a_policy_that_starts_from_an_adapter_is_that_adapter_to_the_bit(
    small_model: Path, adapters: dict[str, Path], kind: str, quantization: str, dtype: str
):
    base, adapter = base_of(small_model, quantization, dtype), Adapter(start_from=str(adapters[kind]))
    if kind == "DoRA" and quantization == "int8":
        with pytest.raises(ModelError, match=r"DoRA beside another adapter needs base\.quantization=nf4"):
            load_model(base, adapter)
        return
    model = load_model(base, adapter)
    logprobs = batch_logprobs(model, DPO(), whole())
    assert torch.equal(logprobs.log_ratio, torch.zeros_like(logprobs.log_ratio))
    loss = DPO()(logprobs).per_example
    assert torch.equal(loss, torch.full_like(loss, math.log(2.0)))
    with as_base(model):
        without = batch_logprobs_of_base(model)
    assert (without - logprobs.policy).abs().max() > 0.01, "the adapter does nothing, so nothing was tested"


def batch_logprobs_of_base(model: Model) -> Tensor:
    from lora_dpo.logprobs import token_logprobs

    batch = whole()
    with as_base(model):
        return batch.per_sequence(token_logprobs(model, batch))


def test_the_adapter_is_loaded_complete_in_float32_and_only_the_policys_copy_trains(
    small_model: Path, adapters: dict[str, Path], kind: str
):
    model = load_model(base_of(small_model, dtype="bfloat16"), Adapter(start_from=str(adapters[kind])))
    saved = load_file(adapters[kind] / "adapter_model.safetensors")
    assert isinstance(model.network, PeftModel)
    for name in ("default", REFERENCE):
        own = adapter_tensors(model.network, name)
        assert own.keys() == saved.keys()
        assert all(own[key].dtype == torch.float32 and torch.equal(own[key], saved[key]) for key in saved)
    sizes = {name: p.numel() for name, p in model.trainable.items()}
    assert sum(sizes.values()) == sum(tensor.numel() for tensor in saved.values())
    assert all("default" in name and REFERENCE not in name for name in sizes)


def test_log_probs_are_those_of_peft_alone(small_model: Path, adapters: dict[str, Path], kind: str):
    """The slower, plainer way: peft's own loading, one sequence at a time, every logit."""
    plain = plain_peft(small_model, adapters[kind])
    model = load_model(base_of(small_model, "none"), Adapter(start_from=str(adapters[kind])))
    expected = torch.stack([plain_logprobs(plain, item) for item in branches()])
    logprobs = batch_logprobs(model, DPO(), whole())
    assert logprobs.reference is not None
    assert (logprobs.policy - expected).abs().max() < 1e-5
    assert (logprobs.reference - expected).abs().max() < 1e-5


def plain_peft(base: Path, folder: Path) -> PeftModel:
    network = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return PeftModel.from_pretrained(network, str(folder), is_trainable=True)


def plain_logprobs(network: Any, item: Any) -> Tensor:
    sums = []
    for side in range(item.sides):
        ids = torch.from_numpy(item.side(side).astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(item.scored[side]))
        logits = network(input_ids=ids[None], use_cache=False).logits[0].double()
        sums.append(torch.log_softmax(logits, dim=-1)[at - 1, ids[at]].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft_alone(
    small_model: Path, adapters: dict[str, Path], kind: str, checkpointing: bool
):
    """With the reference's pass in between, which is over when the policy's backward pass runs."""
    plain, items = plain_peft(small_model, adapters[kind]), branches()
    for item in items:
        chosen, rejected = plain_logprobs(plain, item)
        # At the start every margin is 0, where the slope of −log σ(β · margin) is −β/2.
        (-0.05 * (chosen - rejected) / len(items)).backward()
    model = load_model(base_of(small_model, "none"), Adapter(start_from=str(adapters[kind])))
    if checkpointing:
        model.checkpoint_layers()
    step_gradient(model, DPO(), items, tokens_per_microbatch=90, seed=0)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert expected.keys() == model.trainable.keys()
    for name, parameter in model.trainable.items():
        assert parameter.grad is not None and expected[name] is not None, name
        assert relative(parameter.grad, expected[name]) < 1e-5, name  # pyright: ignore
    assert all(p.grad is None for n, p in model.network.named_parameters() if n not in model.trainable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_leaves_the_reference_as_it_was_to_the_bit(
    small_model: Path, adapters: dict[str, Path], kind: str, dtype: str
):
    model = load_model(base_of(small_model, dtype=dtype), Adapter(start_from=str(adapters[kind])))
    assert isinstance(model.network, PeftModel)
    before, base = reference_logprobs(model, whole()), batch_logprobs_of_base(model)
    values = {key: tensor.clone() for key, tensor in adapter_tensors(model.network, REFERENCE).items()}
    train_some(model)
    assert log_ratio(model).abs().max() > 1e-2, "the policy did not move, so nothing was tested"
    assert torch.equal(reference_logprobs(model, whole()), before)
    assert torch.equal(batch_logprobs_of_base(model), base)
    after = adapter_tensors(model.network, REFERENCE)
    assert all(torch.equal(values[key], after[key]) for key in values)


def test_dropout_is_the_recipes_and_the_reference_has_none(small_model: Path, tmp_path: Path):
    folder = save_adapter_by_peft(tmp_path / "a", small_model, lora_dropout=0.3)
    model = load_model(base_of(small_model), Adapter(start_from=str(folder), dropout=0.5))
    assert torch.equal(reference_logprobs(model, whole()), reference_logprobs(model, whole()))
    assert log_ratio(model).abs().max() > 0, "in training the policy drops"
    preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200)
    model = load_model(base_of(small_model), Adapter(start_from=str(folder)))
    assert not log_ratio(model).any(), "the folder's own dropout is not taken over"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_any_name_and_dtype_is_taken(small_model: Path, tmp_path: Path, dtype: str):
    plain = save_adapter_by_peft(tmp_path / "plain", small_model, dtype=dtype)
    named = save_adapter_by_peft(tmp_path / "named", small_model, name="mine", dtype=dtype)
    assert not (named / "adapter_config.json").exists(), "peft puts it one folder deeper"
    models = [load_model(base_of(small_model), Adapter(start_from=str(f))) for f in (plain, named)]
    prints = [reference_fingerprint(model) for model in models]
    assert prints[0] == prints[1] != "base"
    assert all(p.dtype == torch.float32 for model in models for p in model.trainable.values())


def test_embeddings_that_peft_saved_beside_are_left_out_if_they_are_the_bases_and_refused_if_not(
    small_model: Path, tmp_path: Path
):
    folder = save_adapter_by_peft(tmp_path / "a", small_model)
    file = folder / "adapter_model.safetensors"
    network: Any = AutoModelForCausalLM.from_pretrained(str(small_model))
    weight = network.get_input_embeddings().weight.detach()
    name = "base_model.model.model.embed_tokens.weight"
    save_file(load_file(file) | {name: weight.clone()}, file)
    assert not log_ratio(load_model(base_of(small_model), Adapter(start_from=str(folder)))).any()
    save_file(load_file(file) | {name: weight + 1}, file)
    with pytest.raises(ModelError, match=r"brings another model\.embed_tokens\.weight"):
        load_model(base_of(small_model), Adapter(start_from=str(folder)))


# ---- the base, and another adapter


def test_the_bare_base_beside_a_start_is_what_was_asked_for_in_so_many_words(
    small_model: Path, adapters: dict[str, Path], kind: str
):
    adapter, base = Adapter(start_from=str(adapters[kind])), base_of(small_model, dtype="bfloat16")
    model = load_model(base, adapter, reference=Reference(kind="base"))
    network = load_base(base)
    alone = reference_logprobs(Model(network, None, network.dtype), whole())  # pyright: ignore
    if kind != "saved modules":  # whose head takes the plain way, and rounds otherwise
        assert torch.equal(reference_logprobs(model, whole()), alone)
    assert (reference_logprobs(model, whole()) - alone).abs().max() < 0.05
    assert log_ratio(model).abs().max() > 0.01 and not model.starts_as_reference
    said: list[str] = []
    preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200, say=said.append)
    assert "policy and reference differ from the start" in said[1] and "not checked" in said[1]


@pytest.mark.parametrize("policy", ["fresh", "start"])
def test_another_adapter_speaks_as_the_reference(
    small_model: Path, adapters: dict[str, Path], tmp_path: Path, kind: str, policy: str
):
    """Whatever modules it holds that the policy's doesn't, and the other way about."""
    base, other = base_of(small_model), adapters[kind]
    begun = save_adapter_by_peft(tmp_path / "begun", small_model, seed=9, modules_to_save=["lm_head"])
    adapter = Adapter(rank=2) if policy == "fresh" else Adapter(start_from=str(begun))
    model = load_model(base, adapter, reference=Reference(adapter=str(other)))
    expected = reference_logprobs(load_model(base, Adapter(start_from=str(other))), whole())
    before = reference_logprobs(model, whole())
    assert (before - expected).abs().max() < 1e-5
    started = load_model(base, adapter, reference=None)
    with torch.no_grad():
        unmoved = (
            batch_logprobs(model, DPO(), whole()).policy - batch_logprobs(started, DPO(), whole()).policy
        )
    assert unmoved.abs().max() < 1e-4, "the policy is as it is without that reference"
    assert model.trainable.keys() == started.trainable.keys()
    train_some(model, steps=3)
    assert torch.equal(reference_logprobs(model, whole()), before)
    said: list[str] = []
    model = load_model(base, adapter, reference=Reference(adapter=str(other)))
    preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200, say=said.append)
    assert "differ from the start" in said[1]


def test_a_trained_adapter_against_the_base_is_refused_by_preflight(small_model: Path):
    model = with_random_adapter(load_model(base_of(small_model), Adapter(rank=4)))
    with pytest.raises(PreflightError, match=r"exactly 0.*adapter\.start_from"):
        preflight(model, DPO(), branches(), examples_per_step=4, tokens_per_microbatch=200)


def test_an_objective_without_a_reference_loads_none(small_model: Path, adapters: dict[str, Path]):
    adapter = Adapter(start_from=str(adapters["LoRA"]))
    model = load_model(base_of(small_model), adapter, reference=None)
    assert isinstance(model.network, PeftModel)
    assert list(model.network.peft_config) == ["default"] and model.reference_adapters == ()


# ---- TR-DPO: the reference follows the policy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", ["fresh", *KINDS])
def test_right_after_a_sync_the_policy_is_its_reference_to_the_bit(
    small_model: Path, adapters: dict[str, Path], start: str, dtype: str
):
    adapter = Adapter(rank=4) if start == "fresh" else Adapter(start_from=str(adapters[start]))
    model = load_model(base_of(small_model, dtype=dtype), adapter, reference=Reference(sync_every=2))
    assert not log_ratio(model).any()
    for _ in range(2):
        train_some(model, steps=2, rate=1e-2)
        moved = log_ratio(model)
        assert moved.abs().max() > 1e-2
        prints = [reference_fingerprint(model)]
        sync_reference(model)
        assert not log_ratio(model).any()
        prints.append(reference_fingerprint(model))
        assert prints[0] != prints[1]
    assert not any(p.requires_grad for n, p in model.network.named_parameters() if REFERENCE in n)


def test_the_base_is_not_synchronised(small_model: Path):
    with pytest.raises(ModelError, match="the base is never written to"):
        sync_reference(load_model(base_of(small_model), Adapter(rank=4)))


# ---- refusals


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "adapter"}, "reference.kind=adapter needs reference.adapter"),
        ({"kind": "base", "adapter": "a"}, "name different references: keep one"),
        (
            {"sync_alpha": 0.6},
            r"sync_alpha got 0.6; it takes 1.*products B·A.*reference.sync_every",
        ),
        ({"adapter": "a", "sync_every": 3}, "reference.adapter need not be"),
        ({"kind": "none"}, "one of auto, base, start, adapter"),
        ({"sync_every": 0}, "at least 1"),
    ],
)
def test_references_that_make_no_sense_are_refused(given: dict[str, Any], words: str):
    with pytest.raises(RecipeError, match=words):
        Reference(**given)


@pytest.mark.parametrize(
    ("reference", "start", "words"),
    [
        ({"kind": "start"}, None, r"reference.kind=start needs adapter.start_from"),
        ({"kind": "base", "sync_every": 2}, "somewhere", r"leave reference.kind out"),
    ],
)
def test_a_recipe_whose_adapter_and_reference_do_not_fit_is_refused(
    reference: dict[str, Any], start: str | None, words: str
):
    with pytest.raises(RecipeError, match=words):
        Recipe(Base("m"), Data("d"), adapter=Adapter(start_from=start), reference=Reference(**reference))


@pytest.mark.parametrize(
    ("start", "given", "kind"),
    [
        (None, {}, "base"),
        ("a", {}, "start"),
        ("a", {"kind": "base"}, "base"),
        ("a", {"adapter": "b"}, "adapter"),
        (None, {"adapter": "b"}, "adapter"),
        (None, {"sync_every": 4}, "base"),
    ],
)
def test_what_auto_stands_for(start: str | None, given: dict[str, Any], kind: str):
    assert Reference(**given).of(start) == kind


def in_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def in_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


UNFIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "prompt tuning": (
        in_config(peft_type="PROMPT_TUNING"),
        "of the kind PROMPT_TUNING; LoRA adapters are taken",
    ),
    "a classifier": (in_config(task_type="SEQ_CLS"), "trained for SEQ_CLS"),
    "biases": (in_config(bias="lora_only"), r"adapters off is no longer the base \(bias\)"),
    "biases of factors": (in_config(lora_bias=True), r"\(lora_bias\)"),
    "repeated layers": (in_config(layer_replication=[[0, 2]]), "repeats layers"),
    "PiSSA": (in_config(init_lora_weights="pissa_niter_4"), r"\(pissa_niter_4\) rewrote.*plain LoRA"),
    "OLoRA": (in_config(init_lora_weights="olora"), r"\(olora\) rewrote"),
    "LoftQ": (in_config(init_lora_weights="loftq"), r"\(loftq\) rewrote"),
    "another architecture": (in_config(target_modules=["c_attn"]), "does not fit this base"),
    "another rank": (
        in_config(r=5),
        r"does not fit this base: its model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight is \[3, 64\], and"
        r" by this base and its config it has to be \[5, 64\], and 11 others",
    ),
    "no safetensors": (pickled, "pickled .bin files are not opened"),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "there is no adapter_config.json",
    ),
    "a broken config": (lambda f: (f / "adapter_config.json").write_text("{") and None, "cannot be read"),
    "a tensor too few": (in_tensors(lambda t: t.pop(sorted(t)[0])), "it lacks .*lora_A"),
    "a tensor too many": (
        in_tensors(lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2)})),
        "there is no place for",
    ),
}


@pytest.mark.parametrize(("change", "words"), UNFIT.values(), ids=list(UNFIT))
@pytest.mark.parametrize("key", ["adapter.start_from", "reference.adapter"])
def test_an_adapter_that_cannot_be_used_is_refused_with_the_reason(
    small_model: Path, tmp_path: Path, change: Callable[[Path], Any], words: str, key: str
):
    folder = save_adapter_by_peft(tmp_path / "a", small_model)
    change(folder)
    start = str(folder) if key == "adapter.start_from" else None
    reference = Reference() if start else Reference(adapter=str(folder))
    with pytest.raises(ModelError, match=words) as caught:
        load_model(base_of(small_model), Adapter(start_from=start), reference=reference)
    assert key in str(caught.value)


def test_a_saved_module_that_is_missing_from_the_file_is_named(small_model: Path, tmp_path: Path):
    folder = save_adapter_by_peft(tmp_path / "a", small_model, modules_to_save=["lm_head"])
    in_tensors(lambda tensors: tensors.pop("base_model.model.lm_head.weight"))(folder)
    with pytest.raises(ModelError, match=r"it lacks .*lm_head"):
        load_model(base_of(small_model), Adapter(start_from=str(folder)))


def test_folders_without_one_adapter_are_refused(small_model: Path, tmp_path: Path):
    base = base_of(small_model)
    for name in ("one", "two"):
        save_adapter_by_peft(tmp_path / "several", small_model, name=name)
    with pytest.raises(ModelError, match=r"holds several adapters; name one of .*one, .*two"):
        load_model(base, Adapter(start_from=str(tmp_path / "several")))
    with pytest.raises(ModelError, match=r"adapter\.start_from got .*a local folder"):
        load_model(base, Adapter(start_from="somebody/adapter"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(ModelError, match="holds no trained adapter yet"):
        load_model(base, Adapter(start_from=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 8}, r"adapter\.rank got 8.*\(there: 3\): leave adapter\.rank out"),
        ({"alpha": 8.0}, r"adapter\.alpha got 8\.0.*\(there: 7\.0\)"),
        ({"targets": ("q_proj",)}, r"adapter\.targets .*\(there: \['down_proj', 'q_proj', 'v_proj'\]\)"),
    ],
)
def test_keys_that_the_adapters_folder_decides_are_refused_where_they_differ(
    small_model: Path, adapters: dict[str, Path], given: dict[str, Any], words: str
):
    with pytest.raises(RecipeError, match=words):
        load_model(base_of(small_model), Adapter(start_from=str(adapters["LoRA"]), **given))
    same = {"rank": 3, "alpha": 7.0, "targets": ("v_proj", "q_proj", "down_proj")}
    load_model(base_of(small_model), Adapter(start_from=str(adapters["LoRA"]), **same))  # pyright: ignore


# ---- what is kept of the reference


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_is_the_same_under_whatever_adapter(
    small_model: Path, adapters: dict[str, Path], kind: str, quantization: str
):
    base = base_of(small_model, quantization, "bfloat16")
    expected = base_fingerprint(load_model(base))
    model = load_model(base, Adapter(start_from=str(adapters[kind])))
    assert base_fingerprint(model) == expected
    train_some(model, steps=2)
    sync_reference(model)
    assert base_fingerprint(model) == expected


def test_kept_log_probs_are_found_for_the_same_adapter_only(
    small_model: Path, adapters: dict[str, Path], tmp_path: Path
):
    base, batch = base_of(small_model), whole()

    def found(folder: Path, reference: Reference = Reference()) -> Tensor | None:  # noqa: B008
        model = load_model(base, Adapter(start_from=str(folder)), reference=reference)
        with ReferenceCache.open(model) as cache:
            return cache.peek(batch)

    model = load_model(base, Adapter(start_from=str(adapters["LoRA"])))
    with ReferenceCache.open(model) as cache:
        kept = cache.logprobs(model, batch)
        cache.commit()
    again = found(adapters["LoRA"])
    assert again is not None and torch.equal(again, kept)
    other = save_adapter_by_peft(tmp_path / "other", small_model, seed=1)
    assert found(other) is None
    assert found(adapters["LoRA"], Reference(kind="base")) is None
    assert found(other, Reference(adapter=str(adapters["LoRA"]))) is not None
    train_some(model, steps=1)
    sync_reference(model)
    with ReferenceCache.open(model) as cache:
        assert cache.peek(batch) is None, "a synchronised reference is another one"


# ---- runs


@pytest.fixture
def recipe(small_model: Path, tmp_path: Path) -> Recipe:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(40)))
    return Recipe(
        base=Base(str(small_model), compute_dtype="float32"),
        data=Data(str(rows), eval_last=8),
        training=Training(
            pairs_per_step=8, learning_rate=1e-2, epochs=20, max_steps=6, tokens_per_microbatch=400
        ),
        run_directory=str(tmp_path / "run"),
    )


def files_of(run: RunDirectory, folder: str = "adapter") -> dict[str, Tensor]:
    return load_file(run.path / folder / "adapter_model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def crash_at(step: int) -> Callable[[Record], None]:
    def crash(record: Record) -> None:
        if record.kind == "step" and record.step == step:
            raise Crash

    return crash


class Crash(Exception):
    pass


def test_dpo_goes_on_from_an_sft_run_with_that_run_as_its_reference(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["loss=SFT", "adapter.rank=4", f"run_directory={tmp_path / 'sft'}"]
    sft = train(override(recipe, words), quiet=True)
    run = train(override(recipe, [f"adapter.start_from={sft.path}"]))
    told = capsys.readouterr().out
    assert f"training goes on from the adapter in {sft.path}; reference: that adapter, frozen" in told
    assert "policy = reference at the start: every log-ratio is exactly 0, loss 0.693147" in told
    assert "reference adapter " in told
    assert [r["rewards/accuracy"] for r in run.records() if r["step"] == 1] == [0.5]
    assert same(files_of(run, "reference"), files_of(sft)), "the run is complete without the other one"
    assert {tensor.shape for tensor in files_of(run).values()} == {t.shape for t in files_of(sft).values()}
    assert not same(files_of(run), files_of(sft))


@pytest.mark.parametrize("reference", ["start", "adapter", "sync"])
def test_a_saved_run_speaks_again_as_it_did_and_so_does_its_reference(
    recipe: Recipe, adapters: dict[str, Path], tmp_path: Path, kind: str, reference: str, small_model: Path
):
    start = save_adapter_by_peft(tmp_path / "start", small_model, **KINDS[kind])
    words = [f"adapter.start_from={start}", "training.reference_cache=false", "training.max_steps=3"]
    words += {
        "start": [],
        "adapter": [f"reference.adapter={adapters['LoRA']}"],
        "sync": ["reference.sync_every=2"],
    }[reference]
    seen: list[Record] = []
    run = train(override(recipe, words), observers=[seen.append], quiet=True)
    for file in start.iterdir():
        file.unlink()  # nothing of where it began is needed any more
    then = {name.removeprefix("eval/"): value for name, value in seen[-1].metrics.items()}
    result = evaluate_run(open_finished(run.path)).means()
    for name in ("loss", "logps/chosen", "logps/rejected", "logps/chosen_change", "logps/rejected_change"):
        assert result[name] == then[name], name
    assert result["logps/chosen_change"] != 0


def test_a_finished_run_without_its_reference_is_refused(recipe: Recipe, adapters: dict[str, Path]):
    run = train(
        override(recipe, [f"adapter.start_from={adapters['LoRA']}", "training.max_steps=1"]), quiet=True
    )
    for file in run.reference_folder.iterdir():
        file.unlink()
    with pytest.raises(RunError, match="reference is missing"):
        open_finished(run.path)


def test_answers_side_by_side_are_the_bases_the_references_and_the_policys(
    recipe: Recipe, adapters: dict[str, Path], small_model: Path, tmp_path: Path
):
    start = save_adapter_by_peft(tmp_path / "a", small_model, seed=2, modules_to_save=["lm_head"])
    run = open_finished(train(override(recipe, [f"adapter.start_from={start}"]), quiet=True).path)
    samples = side_by_side(run, max_new_tokens=6)
    assert all(sample.reference is not None for sample in samples)
    fresh = open_finished(
        train(override(recipe, ["loss=SFT", f"run_directory={tmp_path / 'b'}"]), quiet=True).path
    )
    others = side_by_side(fresh, max_new_tokens=6)
    assert all(sample.reference is None for sample in others)
    assert [sample.base for sample in samples] == [sample.base for sample in others]
    assert [sample.base for sample in samples] != [sample.reference for sample in samples]


@pytest.mark.parametrize("start", ["fresh", "saved modules", "trained tokens"])
def test_a_synchronised_run_that_dies_and_resumes_ends_with_the_same_bits(
    recipe: Recipe, tmp_path: Path, adapters: dict[str, Path], start: str
):
    begun = ["adapter.rank=4"] if start == "fresh" else [f"adapter.start_from={adapters[start]}"]
    words = [*begun, "adapter.dropout=0.1", "reference.sync_every=3", "training.save_every=2"]
    recipe = override(recipe, [*words, "training.eval_every=2", "training.max_steps=7"])
    unbroken = train(override(recipe, [f"run_directory={tmp_path / 'whole'}"]), quiet=True)
    with pytest.raises(Crash):
        train(recipe, observers=[crash_at(5)], quiet=True)
    run = RunDirectory(Path(recipe.run_directory))
    folders = {folder.name: (folder / "reference").exists() for folder in run.checkpoints()}
    assert folders == {"step-000002": True, "step-000004": True}, "one lies before a sync, one after it"
    resumed = train(recipe, resume=True, quiet=True)
    for folder in ("adapter", "reference"):
        assert same(files_of(unbroken, folder), files_of(resumed, folder))
    names = ("loss", "eval/loss", "rewards/margin", "eval/logps/chosen_change")
    told = [[[r.get(n) for n in names] for r in one.records()] for one in (unbroken, resumed)]
    assert told[0] == told[1]
    assert not (cache_folder() / "reference").exists(), "no log-prob of a reference that moves is kept"


def test_the_loop_synchronises_after_every_nth_step(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    ratios: list[float] = []

    class Watched(start_module.Trainer):
        def step(self) -> dict[str, float]:
            metrics = super().step()
            with torch.no_grad():
                ratios.append(log_ratio(self.model).abs().max().item())
            return metrics

    monkeypatch.setattr(start_module, "Trainer", Watched)
    run = train(override(recipe, ["reference.sync_every=3"]), quiet=True)
    assert [ratio == 0 for ratio in ratios] == [False, False, True, False, False, True]
    assert json.loads((run.checkpoint_folder(6) / "state.json").read_text())["synced_at"] == 6


@pytest.mark.parametrize("every", [1, 5])
def test_the_kept_adapters_own_reference_is_kept_with_it(recipe: Recipe, every: int):
    """Also where it is from before the first synchronisation."""
    words = ["training.eval_every=1", "training.save_every=1", "training.keep_checkpoints=9"]
    words += ["training.best_metric=logps/rejected", f"reference.sync_every={every}"]
    run = train(override(recipe, words), quiet=True)
    values = {r["step"]: r["eval/logps/rejected"] for r in run.records() if r["kind"] == "evaluation"}
    best = max(values, key=values.__getitem__)
    assert best < 6
    kept = run.checkpoint_folder(best) / "reference" / "adapter_model.safetensors"
    assert same(files_of(run, "reference"), load_file(kept))


@pytest.mark.parametrize("key", ["adapter.start_from", "reference.adapter"])
def test_resuming_with_another_reference_is_refused(
    recipe: Recipe, small_model: Path, tmp_path: Path, key: str
):
    folder = save_adapter_by_peft(tmp_path / "mine", small_model)
    recipe = override(recipe, [f"{key}={folder}", "training.max_steps=2"])
    train(recipe, quiet=True)
    save_adapter_by_peft(folder, small_model, seed=1)
    with pytest.raises(RunError, match=rf"--resume: .*reference: it is not .*{folder} was changed since"):
        train(recipe, resume=True, quiet=True)
    save_adapter_by_peft(folder, small_model)
    train(recipe, resume=True, quiet=True)


def test_a_start_against_the_bare_base_is_noted(
    recipe: Recipe, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    words = [f"adapter.start_from={adapters['LoRA']}", "reference.kind=base", "training.max_steps=1"]
    run = train(override(recipe, words))
    told = capsys.readouterr().out
    assert "note: training goes on from" in told and "the bare base (reference.kind=base)" in told
    assert not run.reference_folder.exists()
    assert open_finished(run.path).model.reference_adapters == ()


def test_a_run_means_the_same_from_another_folder(
    recipe: Recipe, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lora_dpo.recipe import load_recipe

    for name in ("a", "b"):
        save_adapter_by_peft(tmp_path / name, small_model)
    monkeypatch.chdir(tmp_path)
    words = ["adapter.start_from=a", "reference.adapter=b", "training.max_steps=1"]
    recorded = load_recipe(train(override(recipe, words), quiet=True).recipe_file)
    assert recorded.adapter.start_from == str(tmp_path / "a")
    assert recorded.reference.adapter == str(tmp_path / "b")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
def test_a_merged_model_behaves_as_base_and_adapter_did(
    recipe: Recipe, tmp_path: Path, kind: str, tied: bool
):
    base = save_small_model(tmp_path / "base", tie_word_embeddings=tied)
    start = save_adapter_by_peft(tmp_path / "start", base, **KINDS[kind])
    words = [f"base.model={base}", f"adapter.start_from={start}", "training.max_steps=2"]
    source = find_source(train(override(recipe, words), quiet=True).path)
    report = export_merged(source, tmp_path / "merged", Options(dtype="float32"))
    assert report.pairs is not None
    assert report.pairs.found.largest_difference < 1e-4
    assert (report.pairs.found.moved_kl or 0) > 1e-4, "the adapter did too little for this to test anything"
