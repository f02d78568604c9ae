"""What each way of merging keeps of what DPO taught a 4-bit base: the margin, the update, the distribution.

    python tests/benchmarks/merge_dtypes.py [--rates 5e-6 1e-5 2e-5 1e-4] [--steps 296]

Trains ../shared/models/chat-10m on ../shared/data/politeness_900.json (NF4, bfloat16, LoRA of rank 16 on all
linear layers, 16 pairs a step) once for each learning rate, merges the adapter in every way, and compares
each with base + adapter on the last 100 pairs, which were held out, in float32 arithmetic.

Ways: `bfloat16`, `float16`, `float32` are the dequantized base's weights with the update added, stored in
that dtype; `original, …` the same with the base's own 16-bit weights; `peft, 4-bit` is what peft's
merge_and_unload leaves of a 4-bit model: the sum, quantized again. `nothing` is the base alone.

Columns: `margin kept` exported over trained margin, with its 95% interval over resampled pairs; `own margin`
the same over the reference that the way has itself (the original base, for `original`); `update kept`
⟨stored − W, ΔW⟩ / ‖ΔW‖², by the weights; `KL` of base + adapter to the merged model, a token, and `of moved`
over that to the base alone; `top-1` where both think the same token the likeliest; `|Δ log-prob|` of a scored
token, on average and at most; `verdict` by the bars of `lora_dpo.export.proof.bars`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import conditions, print_conditions, print_table, write_json
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from lora_dpo.export import Options, export_merged, find_source
from lora_dpo.export.proof.arithmetic import in_float32
from lora_dpo.export.proof.bars import bars_for, missed
from lora_dpo.export.proof.comparing import compare, margins_of, share_kept
from lora_dpo.export.proof.said import Said, listen, positions_for
from lora_dpo.finished import FinishedRun, open_finished
from lora_dpo.logprobs import vocabulary
from lora_dpo.model import Model, as_base, dequantized, load_adapter, load_model
from lora_dpo.recipe import Adapter, Base, Data, Recipe, Training
from lora_dpo.training import train

SHARED = Path(__file__).resolve().parents[3] / "shared"


def main() -> None:
    options = parse()
    found = conditions()
    print_conditions(found)
    results: list[dict[str, Any]] = []
    for rate in options.rates:
        folder = options.runs / f"rate-{rate:g}"
        if not (folder / "adapter").is_dir():
            train(recipe(options, rate, folder), quiet=True)
        results += measured(rate, folder)
        print(f"learning rate {rate:g}: done", flush=True)
    report(results)
    write_json(options.json, {"conditions": found, "results": results})


def parse() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--model", default=str(SHARED / "models/chat-10m"))
    parser.add_argument("--data", default=str(SHARED / "data/politeness_900.json"))
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-6, 1e-5, 2e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=296)
    parser.add_argument("--quantization", choices=["nf4", "fp4", "int8"], default="nf4")
    parser.add_argument("--runs", type=Path, help="keep the trained runs here, and use those that are there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.runs is None:
        options.runs = Path(tempfile.mkdtemp(prefix="merge-dtypes-"))
    return options


def recipe(options: argparse.Namespace, rate: float, folder: Path) -> Recipe:
    return Recipe(
        base=Base(options.model, quantization=options.quantization, compute_dtype="bfloat16", device="cpu"),
        data=Data(options.data, eval_last=100, on_bad_row="skip"),
        adapter=Adapter(rank=16),
        training=Training(
            pairs_per_step=16,
            learning_rate=rate,
            epochs=100,
            max_steps=options.steps,
            tokens_per_microbatch=4096,
            save_every=0,
            gradient_checkpointing="none",
        ),
        run_directory=str(folder),
    )


def measured(rate: float, folder: Path) -> list[dict[str, Any]]:
    """A row for each way of merging this run's adapter."""
    run = open_finished(folder)
    plain = on_original(run)
    with tempfile.TemporaryDirectory() as place:
        ways = [*merged_files(run, plain, Path(place))]
        updates = {way.name: way.update_kept for way in ways}
        original = heard(plain, plain.model, as_reference=True)
        peft, updates["peft, 4-bit"] = merged_by_peft(run)
        trained, base = both(run)
        said = {"nothing": base}
        said |= {way.name: heard(run, reloaded(way.folder)) for way in ways}
        said |= {"peft, 4-bit": heard(run, peft)}
    return [
        row(run, name, trained, base, one, original if name.startswith("original") else base)
        | {"rate": rate, "update kept": updates.get(name, 0.0)}
        | {"verdict": verdict(run, name, trained, base, one, updates)}
        for name, one in said.items()
    ]


@dataclasses.dataclass(frozen=True)
class Way:
    """A merged model's folder, and the share of the update that its weights kept."""

    name: str
    folder: Path
    update_kept: float


def merged_files(run: FinishedRun, plain: FinishedRun, place: Path) -> Iterator[Way]:
    source = find_source(run.directory.path)
    for prefix, base, on in (("", "dequantized", run), ("original, ", "original", plain)):
        for dtype in ("bfloat16", "float16", "float32"):
            name = prefix + dtype
            options: Any = {"dtype": dtype, "base": base, "verify": False, "accept": True}
            export_merged(source, place / name, Options(**options))
            stored = load_file(place / name / "model.safetensors")
            share = update_kept(on.model, lambda path, stored=stored: stored[path + ".weight"])
            yield Way(name, place / name, share)


def on_original(run: FinishedRun) -> FinishedRun:
    """The run's adapter on the base as it was before it was quantized."""
    plain = dataclasses.replace(run.recipe.base, quantization="none", compute_dtype="float32")
    return dataclasses.replace(run, model=load_adapter(load_model(plain), str(run.directory.adapter_folder)))


def update_kept(model: Model, stored: Callable[[str], Tensor]) -> float:
    """⟨stored − W, ΔW⟩ / ‖ΔW‖² over all layers with an adapter; stored: path of a layer → its weight now."""
    along = size = 0.0
    for path, layer in model.causal.named_modules():
        if isinstance(layer, LoraLayer):
            weight = dequantized(layer.get_base_layer()).detach().float()
            module: Any = layer
            update = module.get_delta_weight("default").detach().double()
            along += float(((stored(path).float() - weight).double() * update).sum())
            size += float(update.square().sum())
    return along / size


def merged_by_peft(run: FinishedRun) -> tuple[Model, float]:
    """A 4-bit model after peft's merge_and_unload, and the share of the update in its weights."""
    base = run.recipe.base
    adapted = load_adapter(load_model(base), str(run.directory.adapter_folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module")
        network: Any = adapted.network
        merged = dataclasses.replace(load_model(base), network=network.merge_and_unload())
    share = update_kept(run.model, lambda path: dequantized(merged.causal.get_submodule(path)))
    return in_float32(merged), share


def reloaded(folder: Path) -> Model:
    return load_model(Base(str(folder), quantization="none", compute_dtype="float32", device="cpu"))


def both(run: FinishedRun) -> tuple[Said, Said]:
    """What base + adapter say, and the base alone; afterwards the run's model computes in float32."""
    model = in_float32(run.model)
    return heard(run, model), heard(run, model, as_reference=True)


def heard(run: FinishedRun, model: Model, *, as_reference: bool = False) -> Said:
    with as_base(model) if as_reference else contextlib.nullcontext():
        return listen(model, run.data.eval, positions=positions_for(vocabulary(model)))


def row(run: FinishedRun, name: str, trained: Said, base: Said, one: Said, own: Said) -> dict[str, Any]:
    """own: what the reference of this way says."""
    found = compare(trained, base, one, run.data.eval)
    margins = [margins_of(*pair, run.data.eval, "pairs") for pair in ((trained, base), (one, own))]
    return {
        "way": name,
        "trained margin": found.margin[0].mean,
        "margin kept": str(found.kept),
        "own margin": str(share_kept(*margins)),
        "KL": found.kl,
        "of moved": found.kl / (found.moved_kl or 1.0),
        "top-1": found.top1,
        "|Δ log-prob|": found.difference,
        "largest": found.largest_difference,
        "accuracy": found.accuracy[1].mean if found.accuracy else None,
    }


def verdict(
    run: FinishedRun, name: str, trained: Said, base: Said, one: Said, updates: dict[str, float]
) -> str:
    if name.startswith("original"):
        return "another function"
    bars = bars_for(compared=True)
    wrong = missed(bars, {"kept": updates.get(name, 0.0)}, compare(trained, base, one, run.data.eval))
    return f"{len(wrong)} missed" if wrong else "passed"


def report(rows: list[dict[str, Any]]) -> None:
    for rate in dict.fromkeys(row["rate"] for row in rows):
        of_rate = [row for row in rows if row["rate"] == rate]
        first = of_rate[0]
        print(f"\nlearning rate {rate:g}: trained margin {first['trained margin']:.4f}")
        print_table(
            [{k: v for k, v in row.items() if k not in ("rate", "trained margin")} for row in of_rate]
        )


if __name__ == "__main__":
    main()
