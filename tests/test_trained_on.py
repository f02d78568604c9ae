"""An adapter knows the weights that it was trained on, wherever they lie, and is put on no others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import xxhash
from builders import CHATML, pair_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_dpo.errors import ModelError, RunError
from lora_dpo.export import export, find_source
from lora_dpo.finished import open_finished
from lora_dpo.model import (
    content_hash,
    load_adapter,
    load_model,
    loading,
    read_header,
    read_record,
    trained_on,
)
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Reference, Training, override
from lora_dpo.run_directory import MANIFEST, RunDirectory, cache_folder, damage
from lora_dpo.training import Display, Record, train

ODD = {
    "b.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "a.weight": torch.linspace(-1, 1, 5, dtype=torch.float32),
    "a.bias": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.zeros(0, 7, dtype=torch.float16),
    "mask": torch.tensor([True, False, True]),
    "fp8": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
    "packed": torch.arange(200, dtype=torch.uint8),
}


def base_in(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Base:
    """A folder with a base's weights and nothing else."""
    folder.mkdir(exist_ok=True)
    save_file(ODD if tensors is None else tensors, folder / "model.safetensors")
    return Base(str(folder))


def aged(folder: Path) -> None:
    """As if its files had been written a minute ago: what was written just now is not remembered."""
    for file in folder.iterdir():
        then = file.stat().st_mtime_ns - 60 * 10**9
        os.utime(file, ns=(then, then))


def sharded(model: Path, to: Path) -> Path:
    """The same weights in several files, in another folder."""
    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)
    folder = shutil.copytree(model, to)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(str(folder), max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def other_weights(model: Path, to: Path) -> Path:
    """A base of the same shapes, one weight of which differs in its last bit."""
    folder = shutil.copytree(model, to)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int16)[7] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- the hash of a base


def test_the_hash_is_that_of_all_tensors_by_name(tmp_path: Path):
    """Once more in the plainest way: all in memory, through the safetensors library."""
    base, text = base_in(tmp_path), b""
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor, dtype = file.get_tensor(name), file.get_slice(name).get_dtype()
            text += json.dumps([name, dtype, list(tensor.shape)]).encode() + b"\0"
            text += bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert content_hash(base) == xxhash.xxh3_128_hexdigest(text)


def test_blocks_do_not_change_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = base_in(tmp_path)
    expected = content_hash(base)
    monkeypatch.setattr("lora_dpo.model.stored.BLOCK", 7)
    assert content_hash(base) == expected


def test_a_base_in_another_folder_or_in_shards_is_the_same(small_model: Path, tmp_path: Path):
    expected = content_hash(Base(str(small_model)))
    moved = shutil.copytree(small_model, tmp_path / "moved")
    tensors = load_file(moved / "model.safetensors")
    # The library orders a file's tensors by their dtypes; beside a larger one they lie elsewhere in it.
    save_file(dict(reversed(tensors.items())), moved / "model.safetensors", metadata={"note": "other bytes"})
    assert content_hash(Base(str(moved))) == expected
    assert content_hash(Base(str(sharded(small_model, tmp_path / "shards")))) == expected


def test_a_link_to_a_base_is_the_same(small_model: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(small_model)
    assert content_hash(Base(str(tmp_path / "link"))) == content_hash(Base(str(small_model)))


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a.weigh"] = tensors.pop("a.weight")


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["b.weight"] = tensors["b.weight"].reshape(4, 3)


def as_other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["b.weight"] = tensors["b.weight"].view(torch.float16)


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["packed"] = tensors["packed"] ^ torch.tensor([0] * 199 + [1], dtype=torch.uint8)


def left_out(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["none"]


@pytest.mark.parametrize("change", [renamed, reshaped, as_other_dtype, one_bit, left_out])
def test_whatever_differs_in_a_base_gives_another_hash(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]
):
    tensors = {name: tensor.clone() for name, tensor in ODD.items()}
    change(tensors)
    assert content_hash(base_in(tmp_path / "b", tensors)) != content_hash(base_in(tmp_path / "a"))


# ---- remembered


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """What was read whole for a hash, in order."""
    seen: list[list[Path]] = []
    whole = trained_on.hash_of

    def watched(files: list[Path]) -> str:
        seen.append(files)
        return whole(files)

    monkeypatch.setattr(trained_on, "hash_of", watched)
    return seen


def test_a_base_is_read_once_and_again_when_its_files_changed(tmp_path: Path, readings: list[list[Path]]):
    base = base_in(tmp_path / "base")
    aged(tmp_path / "base")
    first = content_hash(base)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert content_hash(base) == content_hash(Base(str(tmp_path / "link"))) == first
    assert len(readings) == 1
    changed = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    times = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "base" / "model.safetensors").write_bytes(changed)
    os.utime(tmp_path / "base" / "model.safetensors", ns=(times, times))  # of the same size and time
    assert content_hash(base) != first
    assert len(readings) == 2


def test_what_was_written_just_now_is_not_remembered(tmp_path: Path, readings: list[list[Path]]):
    """Another writing within a tick of the file system's clock would not be seen."""
    base = base_in(tmp_path / "base")
    assert content_hash(base) == content_hash(base)
    assert len(readings) == 2


def test_a_damaged_memory_of_a_base_is_not_used(tmp_path: Path, readings: list[list[Path]]):
    base = base_in(tmp_path / "base")
    aged(tmp_path / "base")
    first = content_hash(base)
    (memo,) = (cache_folder() / "bases").iterdir()
    whole = memo.read_bytes()
    broken = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 4)]
    broken += [whole[:at] for at in range(0, len(whole), 40)]
    broken += [b"[" * 100_000, b"[]\n", b'{"content": 5}\n', b"\xff"]
    for count, text in enumerate(broken, start=2):
        memo.write_bytes(text)
        assert content_hash(base) == first
        assert len(readings) == count, text
    assert memo.read_bytes() == whole, "and it is mended"


def test_a_cache_folder_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[list[Path]]
):
    base = base_in(tmp_path / "base")
    aged(tmp_path / "base")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "file" / "cache"))
    assert content_hash(base) == content_hash(base)
    assert len(readings) == 2


def test_reading_a_large_base_is_said_the_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trained_on, "SAID_FROM", 100)
    base, said = base_in(tmp_path / "base"), []
    aged(tmp_path / "base")
    for _ in range(2):
        content_hash(base, say=said.append)
    assert len(said) == 1 and "0.0 MiB of weights, once" in said[0]
    monkeypatch.setattr(trained_on, "SAID_FROM", 10**6)
    content_hash(base_in(tmp_path / "other"), say=said.append)
    assert len(said) == 1


# ---- a stranger's files


def header_of(value: Any, data: int = 8) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def tensor(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": b"",
    "short": b"\x05\0\0",
    "a header longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": header_of(b"{nothing"),
    "no text": header_of(b"\xff\xfe{}"),
    "deep": header_of(b"[" * 100_000),
    "a list": header_of([1, 2]),
    "a tensor that is none": header_of({"w": 5}),
    "no shape": header_of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "a negative size": header_of({"w": tensor(offsets=[8, 0])}),
    "a negative shape": header_of({"w": tensor(shape=[-2])}),
    "a shape of bools": header_of({"w": tensor(shape=[True, 2])}),
    "three offsets": header_of({"w": tensor(offsets=[0, 4, 8])}),
    "too many dimensions": header_of({"w": tensor(shape=[2] + [1] * 100)}),
    "a shape that its bytes don't fill": header_of({"w": tensor(shape=[3])}),
    "past the end": header_of({"w": tensor(shape=[4], offsets=[0, 16])}),
    "an unknown dtype past the end": header_of({"w": tensor(dtype="F3", offsets=[0, 9])}),
    "a gap": header_of({"w": tensor(shape=[1], offsets=[4, 8])}),
    "the same bytes twice": header_of({"w": tensor(), "v": tensor()}),
    "bytes that belong to none": header_of({"w": tensor(shape=[1], offsets=[0, 4])}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_broken_safetensors_file_is_refused_by_name(tmp_path: Path, kind: str):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[kind])
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file, or a damaged one: "):
        content_hash(Base(str(tmp_path)))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = base_in(tmp_path)
    tensors = read_header(tmp_path / "model.safetensors")
    monkeypatch.setattr("lora_dpo.model.stored.read_header", lambda file: tensors)
    os.truncate(tmp_path / "model.safetensors", tensors[-1].start)
    with pytest.raises(ModelError, match=r"model\.safetensors .* it ends within "):
        content_hash(base)


def test_a_dtype_of_the_future_is_hashed(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(header_of({"w": tensor(dtype="F3", shape=[21])}))
    assert len(content_hash(Base(str(tmp_path)))) == 32


@pytest.mark.parametrize(
    "names",
    [{"w": "../model.safetensors"}, {"w": "/etc/passwd"}, {"w": "sub/model.safetensors"}, {"w": 5}, {}],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, names: Any):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"index\.json names no \.safetensors files beside it"):
        content_hash(Base(str(tmp_path)))


def test_weights_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"there is no model\.safetensors in its folder"):
        content_hash(Base(str(tmp_path)))
    with pytest.raises(ModelError, match=r"someone/other: there is no model\.safetensors .* local cache"):
        content_hash(Base("someone/other"))
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-1\.safetensors, which .* names, is missing"):
        content_hash(Base(str(tmp_path)))


def test_weights_under_another_name_are_those_that_are_loaded(small_model: Path, tmp_path: Path):
    folder = other_weights(small_model, tmp_path / "other")
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    shutil.copy(small_model / "model.safetensors", folder)
    assert content_hash(Base(str(folder))) == content_hash(Base(str(small_model)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    assert content_hash(Base(str(folder))) != content_hash(Base(str(small_model)))


# ---- written by training


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(24)))
    return file


def a_recipe(base: Path | str, rows: Path, to: Path, *words: str) -> Recipe:
    recipe = Recipe(
        base=Base(str(base), compute_dtype="float32"),
        data=Data(str(rows), eval_last=4),
        adapter=Adapter(rank=2),
        training=Training(pairs_per_step=4, max_steps=2, learning_rate=1e-2, tokens_per_microbatch=800),
        run_directory=str(to),
    )
    return override(recipe, words)


@pytest.fixture(scope="module")
def trained(small_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train(a_recipe(small_model, rows, tmp_path_factory.mktemp("run") / "run"), quiet=True)


def test_training_writes_what_it_trained_on(trained: RunDirectory, small_model: Path):
    from lora_dpo import __version__

    assert json.loads((trained.adapter_folder / "trained_on.json").read_text()) == {
        "format": 1,
        "base": {
            "model": str(small_model),
            "revision": None,
            "commit": None,
            "content": content_hash(Base(str(small_model))),
            "architecture": "LlamaForCausalLM",
        },
        "quantization": "nf4",
        "double_quantization": True,
        "compute_dtype": "float32",
        "template": hashlib.sha256(CHATML.encode()).hexdigest(),
        "lora_dpo": __version__,
    }
    template = (trained.adapter_folder / "chat_template.jinja").read_text()
    record = read_record(trained.adapter_folder)
    assert record is not None and record.template == hashlib.sha256(template.encode()).hexdigest()


def test_the_record_belongs_to_what_the_run_wrote(trained: RunDirectory, tmp_path: Path):
    run = RunDirectory(shutil.copytree(trained.path, tmp_path / "copy"))
    assert damage(run.adapter_folder) is None
    file = run.adapter_folder / "trained_on.json"
    file.write_text(file.read_text().replace("nf4", "fp4"))
    with pytest.raises(RunError, match=r"not as the run wrote it: trained_on\.json is changed"):
        open_finished(run.path)


class Crash(Exception):
    pass


def test_a_run_that_died_writes_the_same_folder(small_model: Path, rows: Path, tmp_path: Path):
    words = ["training.max_steps=4", "training.save_every=1"]
    whole = train(a_recipe(small_model, rows, tmp_path / "whole", *words), quiet=True)
    broken = a_recipe(small_model, rows, tmp_path / "broken", *words)

    def crash(record: Record) -> None:
        if record.kind == "step" and record.step == 3:
            raise Crash

    with pytest.raises(Crash):
        train(broken, observers=[crash], quiet=True)
    resumed = train(broken, resume=True, quiet=True)
    files = {file.name: file.read_bytes() for file in whole.adapter_folder.iterdir()}
    assert files == {file.name: file.read_bytes() for file in resumed.adapter_folder.iterdir()}
    assert "trained_on.json" in files


def test_the_hash_is_that_of_the_files_at_the_start(small_model: Path, rows: Path, tmp_path: Path):
    base = shutil.copytree(small_model, tmp_path / "base")
    expected = content_hash(Base(str(base)))

    def overwrite(record: Record) -> None:
        if record.step == 1:
            shutil.rmtree(base)
            shutil.copytree(other_weights(small_model, tmp_path / "other"), base)

    run = train(a_recipe(base, rows, tmp_path / "run"), observers=[overwrite], quiet=True)
    record = read_record(run.adapter_folder)
    assert record is not None and record.content == expected
    with pytest.raises(ModelError, match="was trained on another base"):
        open_finished(run.path)


def test_a_base_that_cannot_be_hashed_is_trained_on_all_the_same(
    small_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def cannot(base: Base) -> list[Path]:
        raise ModelError("its files are nowhere")

    monkeypatch.setattr(trained_on, "weight_files", cannot)
    run = train(a_recipe(small_model, rows, tmp_path / "run"))
    told = capsys.readouterr().out
    assert "note: the adapter will not be held to this base" in told and "files are nowhere" in told
    record = read_record(run.adapter_folder)
    assert record is not None and record.content is None
    open_finished(run.path, display=Display())
    assert "holds no hash of the weights that it was trained on" in capsys.readouterr().out
    export(find_source(run.path), "adapter", tmp_path / "exported", display=Display())
    assert "could not be checked" in capsys.readouterr().out


@pytest.mark.parametrize("hashed", [True, False])
def test_an_adapter_of_another_architecture_is_refused_even_on_the_same_weights(
    trained: RunDirectory, small_model: Path, tmp_path: Path, hashed: bool
):
    """The tensors of a Llama are a Mistral's too; what they compute is not the same."""
    adapter = shutil.copytree(trained.adapter_folder, tmp_path / "adapter")
    base = shutil.copytree(small_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    if not hashed:
        record = json.loads((adapter / "trained_on.json").read_text())
        record["base"]["content"] = None
        (adapter / "trained_on.json").write_text(json.dumps(record))
        (adapter / MANIFEST).unlink()
    reason = "on another architecture: on a 'LlamaForCausalLM', .* is a MistralForCausalLM"
    with pytest.raises(ModelError, match=reason):
        find_source(adapter, base_model=str(base))
    with pytest.raises(ModelError, match=reason):
        load_adapter(load_model(Base(str(base), compute_dtype="float32")), str(adapter))
    (adapter / "trained_on.json").unlink()
    (adapter / MANIFEST).unlink(missing_ok=True)
    source = find_source(adapter, base_model=str(base))
    assert source.base.quantization == "none" and "doesn't say which weights" in source.notes[0]


def test_the_hubs_commit_and_revision_are_named(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, commit = tmp_path / "hub", "c" * 40
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    home = cache / "models--someone--small"
    shutil.copytree(small_model, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "v2.0").write_text(commit)
    run = train(a_recipe("someone/small", rows, tmp_path / "run", "base.revision=v2.0"), quiet=True)
    record = read_record(run.adapter_folder)
    assert record is not None
    assert (record.model, record.revision, record.commit) == ("someone/small", "v2.0", commit)
    assert record.content == content_hash(Base(str(small_model)))
    config = json.loads((run.adapter_folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/small", "v2.0")
    # From the hub or from a folder, it is the same base.
    load_adapter(load_model(Base(str(small_model))), str(run.adapter_folder))
    open_finished(run.path)


# ---- held to it


def refused(trained: RunDirectory, base: Path, other: Path) -> str:
    """A pattern of what must be said."""
    there, here = (content_hash(Base(str(folder))) for folder in (base, other))
    said = f"was trained on another base: on {base}, .* {there}; base.model {other} has {here}"
    return rf"the adapter in {trained.adapter_folder} {said}.*without trained_on\.json"


@pytest.mark.parametrize("key", ["adapter.start_from", "reference.adapter"])
def test_training_from_an_adapter_of_another_base_is_refused_before_the_base_is_loaded(
    trained: RunDirectory, small_model: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
):
    other = other_weights(small_model, tmp_path / "other")
    folder = str(trained.path)
    adapter = Adapter(start_from=folder) if key == "adapter.start_from" else Adapter(rank=2)
    reference = Reference(adapter=folder) if key == "reference.adapter" else Reference()

    def must_not(*arguments: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(loading, "load_base", must_not)
    with pytest.raises(ModelError, match=f"{key}: {refused(trained, small_model, other)}"):
        load_model(Base(str(other)), adapter, reference=reference)


def test_an_adapter_is_not_put_on_another_base(trained: RunDirectory, small_model: Path, tmp_path: Path):
    other = other_weights(small_model, tmp_path / "other")
    model = load_model(Base(str(other)))
    with pytest.raises(ModelError, match=refused(trained, small_model, other)):
        load_adapter(model, str(trained.adapter_folder))
    bare = shutil.copytree(trained.adapter_folder, tmp_path / "bare")
    (bare / "trained_on.json").unlink()
    with pytest.raises(ModelError, match=r"^the reference in"):
        load_adapter(model, str(bare), reference=str(trained.adapter_folder))


def test_a_base_that_comes_from_the_hub_only_now_is_looked_at_when_it_is_there(
    trained: RunDirectory, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before it is loaded its files are not here, and are not fetched to look at them."""
    other = other_weights(small_model, tmp_path / "other")

    def not_yet(base: Base) -> list[Path]:
        raise ModelError("not here yet")

    monkeypatch.setattr(loading, "weight_files", not_yet)
    with pytest.raises(ModelError, match=refused(trained, small_model, other)):
        load_model(Base(str(other)), Adapter(start_from=str(trained.path)))


def test_a_finished_run_whose_base_was_replaced_is_refused(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = shutil.copytree(small_model, tmp_path / "base")
    run = train(a_recipe(base, rows, tmp_path / "run"), quiet=True)
    open_finished(run.path)
    shutil.rmtree(base)
    other_weights(small_model, base)
    monkeypatch.setattr(loading, "load_base", None)  # it isn't come to that
    with pytest.raises(ModelError, match=f"the adapter in {run.adapter_folder} was trained on another base"):
        open_finished(run.path)


@pytest.mark.parametrize("move", [shutil.copytree, sharded])
def test_the_same_base_elsewhere_is_its_base(
    trained: RunDirectory, small_model: Path, tmp_path: Path, move: Callable[[Path, Path], Path]
):
    base = move(small_model, tmp_path / "elsewhere")
    load_model(Base(str(base)), Adapter(start_from=str(trained.path)))
    moved = open_finished(trained.path, overrides=[f"base.model={base}"])
    assert moved.recipe.base.model == str(base)


def test_an_adapter_without_a_record_is_taken_on_any_base_that_it_fits(
    trained: RunDirectory, small_model: Path, tmp_path: Path
):
    bare = shutil.copytree(trained.adapter_folder, tmp_path / "bare")
    (bare / "trained_on.json").unlink()
    other = other_weights(small_model, tmp_path / "other")
    load_model(Base(str(other)), Adapter(start_from=str(bare)))
    load_adapter(load_model(Base(str(other))), str(bare))


def test_the_reference_that_a_run_keeps_knows_its_base_too(
    trained: RunDirectory, small_model: Path, rows: Path, tmp_path: Path
):
    words = [f"adapter.start_from={trained.path}", "adapter.rank=16"]
    run = train(a_recipe(small_model, rows, tmp_path / "run", *words), quiet=True)
    ours, theirs = (read_record(folder) for folder in (run.reference_folder, trained.adapter_folder))
    assert ours == theirs is not None
    assert damage(run.reference_folder) is None
    open_finished(run.path)


# ---- what may differ is said


def test_another_quantization_and_another_template_are_said(
    trained: RunDirectory,
    small_model: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    words = [f"adapter.start_from={trained.path}", "adapter.rank=16", "training.max_steps=1"]
    train(a_recipe(small_model, rows, tmp_path / "same", *words))
    assert "was trained" not in capsys.readouterr().out
    words += ["base.quantization=int8", f"data.chat_template={CHATML}{{# mine #}}"]
    train(a_recipe(small_model, rows, tmp_path / "other", *words))
    told = capsys.readouterr().out
    adapter = f"note: the adapter in {trained.adapter_folder} was trained"
    assert f"{adapter} on the base in nf4 with double quantization, and is used on it in int8" in told
    assert f"{adapter} with another chat template" in told
    assert told.count("note: the adapter") == 2


def test_overrides_that_make_a_finished_run_another_are_said(
    trained: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    from lora_dpo.training import Display

    open_finished(trained.path, display=Display())
    assert "was trained" not in capsys.readouterr().out
    open_finished(trained.path, display=Display(), overrides=["base.double_quantization=false"])
    told = capsys.readouterr().out
    assert "the base in nf4 with double quantization, and is used on it in nf4: together" in told


DAMAGED = {
    "no object": "[]",
    "no JSON": "{",
    "another format": {"format": 2},
    "no base": {"base": None},
    "a hash that is none": {"base": {"content": "../" * 10}},
    "a hash in capitals": {"base": {"content": "A" * 32}},
    "a name that is none": {"base": {"model": 5}},
    "a revision that is none": {"base": {"revision": ["main"]}},
    "a flag that is none": {"double_quantization": "yes"},
    "a template that is none": {"template": "x"},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_record_that_is_none_is_refused_by_name(trained: RunDirectory, tmp_path: Path, kind: str):
    values, change = json.loads((trained.adapter_folder / "trained_on.json").read_text()), DAMAGED[kind]
    if isinstance(change, dict):
        base = change.get("base", {})
        values |= change | {"base": None if base is None else values["base"] | base}
    (tmp_path / "trained_on.json").write_text(json.dumps(values) if isinstance(change, dict) else change)
    with pytest.raises(ModelError, match=r"trained_on\.json"):
        read_record(tmp_path)


def test_a_strangers_record_cannot_write_to_the_terminal(
    trained: RunDirectory, small_model: Path, tmp_path: Path
):
    folder = shutil.copytree(trained.adapter_folder, tmp_path / "theirs")
    values = json.loads((folder / "trained_on.json").read_text())
    values["base"] |= {"model": "\x1b[2Jnice", "content": "0" * 32, "commit": "\n\x1b[31m"}
    (folder / "trained_on.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="another base") as caught:
        load_model(Base(str(small_model)), Adapter(start_from=str(folder)))
    assert str(caught.value).isprintable()
