"""The probe: every way of running a micro-batch against one sequence at a time, on a small random model.

A way is right where token log-probs agree with the model's own attention on one sequence at a time, and where
changing one rest leaves all other sequences as they were, to the bit. The first right way, from the cheapest
on, is the verdict; what can't be told is "padded", never a guess.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

import lora_dpo
from lora_dpo.batching import MicroBatch, Way, collate
from lora_dpo.errors import RunError
from lora_dpo.preferences import Where
from lora_dpo.probe.small import small_models
from lora_dpo.run_directory import cache_folder, write_text
from lora_dpo.tokenization import Branches
from lora_dpo.ways import has_experts, scored_hidden, use_attention

PROBE = 1
"""To be raised when a change of attention, ways or the probe may change a verdict: old ones are not read."""

WAYS: tuple[Way, ...] = get_args(Way)
TOLERANCE = 1e-4
"""How far a token's log-prob may be off, in nats. Norms, rotary embeddings and softmax compute in float32
inside a float64 model, which leaves about 1e-6; a way that is wrong is off by 1e-2 at the very least."""
VISIBLE = 1e-2
"""What a changed token must do to those after it, or the small model is too dull to tell anything."""
ROUNDING = 1e-6
"""Mixtures of experts group the tokens of all sequences by expert: another grouping rounds otherwise."""

SAYS: dict[Way, str] = {
    "shared": "prefixes shared",
    "shared by mask": "prefixes shared, by an explicit mask",
    "packed": "packed, prefixes not shared",
    "packed by mask": "packed under an explicit mask, prefixes not shared",
    "padded": "padded, one row a response",
    "single": "one response at a time",
}


@dataclass(frozen=True)
class Verdict:
    """The way that an architecture runs in, and why.

    difference: of a token's log-prob from one sequence at a time, at most, in nats; None if not measured.
    reason: what was wrong with the cheaper ways, in words.
    """

    way: Way
    reason: str = ""
    difference: float | None = None

    def __str__(self) -> str:
        parts = [self.reason] if self.reason else []
        if self.difference is not None:
            off = f"{self.difference:.0e} from" if self.difference else "equal to"
            parts.append(f"float64 probe: {off} one sequence at a time")
        return SAYS[self.way] + (f" ({'; '.join(parts)})" if parts else "")


ASSUMED = Verdict("shared", "not probed")
"""Of a model that its caller built and set up."""


def probe(config: Any, **options: Any) -> Verdict:
    """The way for models of this transformers config; kept on disk, since it is a function of the config.

    options: of `AutoModelForCausalLM.from_config`, such as trust_remote_code. Takes about a second on one
    core; touches neither the random state nor the default dtype. Never raises for what a model does.
    """
    file = cache_file(config, options)
    known = _read(file)
    if known is None:
        with _quiet():
            known = _probe(config, options)
        if known.difference is not None:
            _write(file, known)  # what could not be told may be told next time
    return known


def _probe(config: Any, options: dict[str, Any]) -> Verdict:
    problem = "no small copy of it runs"
    try:
        for network in small_models(config, **options):
            try:
                return judge(network)
            except Exception as error:  # whatever an unknown architecture's own code raises
                problem = f"a small copy of it fails: {_in_words(error)}"
    except Exception as error:
        problem = f"no small copy of it can be built: {_in_words(error)}"
    return Verdict("padded", problem)


def judge(network: PreTrainedModel) -> Verdict:
    """The verdict on a float64 model in train mode, without dropout, whose weights make attention matter.

    Raises what the model raises where not even one sequence at a time runs, and ValueError where its numbers
    can't tell a right way from a wrong one.
    """
    batch = probe_batch(network.get_input_embeddings().weight.shape[0])  # pyright: ignore
    truth = _logprobs(network, batch, "single")
    _check_sight(network, batch, truth)
    wrong: list[str] = []
    for way in WAYS:
        problem, difference = _try(network, batch, way, truth)
        if problem is None:
            return Verdict(way, ", ".join(wrong), difference)
        wrong.append(f"{way}: {problem}")
    raise ValueError(f"no way agrees with itself ({', '.join(wrong)})")


def probe_batch(vocabulary: int) -> MicroBatch:
    """Two examples of two sides, longer than the small models' windows and chunks, from a fixed seed."""
    rng = np.random.default_rng(0)
    items = []
    for prefix, *rests in ((11, 9, 14), (5, 6, 3)):
        parts = [rng.integers(1, vocabulary, length).astype(np.int32) for length in (prefix, *rests)]
        scored = [np.arange(prefix + rest) >= prefix - 1 for rest in rests]
        items.append(Branches(parts[0], tuple(parts[1:]), tuple(scored), Where("probe", len(items) + 1)))
    return collate(items, range(len(items)))


def _check_sight(network: PreTrainedModel, batch: MicroBatch, truth: Tensor) -> None:
    if not bool(torch.isfinite(truth).all()):
        raise ValueError("its small copy gives no finite log-probs")
    near = (batch.layout.example == 0) & (batch.layout.branch == 0) & (batch.positions == 8)
    seen = (_logprobs(network, _changed(batch, near), "single") - truth).abs()
    by_side = [seen[batch.sequences == side].max().item() for side in range(2)]
    if min(by_side) < VISIBLE:
        raise ValueError("its small copy hardly looks at earlier tokens")


def _try(network: PreTrainedModel, batch: MicroBatch, way: Way, truth: Tensor) -> tuple[str | None, float]:
    """What is wrong with a way, or None, and by how much it is off."""
    try:
        logprobs = _logprobs(network, batch, way)
        rest = (batch.layout.example == 0) & (batch.layout.branch == 1)
        changed = _logprobs(network, _changed(batch, rest), way)
    except Exception as error:  # a model may refuse what it wasn't made for in any way it likes
        return f"{type(error).__name__}", float("nan")
    difference = (logprobs - truth).abs().max().item()
    if not difference <= TOLERANCE:
        return f"off by {difference:.2g}", difference
    leak = (changed - logprobs)[batch.sequences != 0].abs().max().item()
    if not leak <= (ROUNDING if has_experts(network) else 0.0):
        return f"a rest moves another by {leak:.2g}", difference
    return None, difference


def _logprobs(network: PreTrainedModel, batch: MicroBatch, way: Way) -> Tensor:
    """Log-probs of the score rows [S], without what some models do to their logits: no way changes that."""
    use_attention(network, way)
    with torch.no_grad():
        head: Any = network.get_output_embeddings()
        logits = head(scored_hidden(network, batch, way).to(head.weight.dtype))
        return torch.log_softmax(logits.double(), dim=-1).gather(1, batch.targets[:, None])[:, 0]


def _changed(batch: MicroBatch, which: Tensor) -> MicroBatch:
    """The batch with these tokens replaced by others."""
    low, high = 1, int(batch.token_ids.max())
    other = low + (batch.token_ids - low + 7) % (high - low + 1)
    return replace(batch, token_ids=torch.where(which, other, batch.token_ids))


def _in_words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:160]}".rstrip(": ")


@contextmanager
def _quiet() -> Iterator[None]:
    """Nobody's random state moves, and nothing is said about odd configs."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)


def cache_file(config: Any, options: dict[str, Any]) -> Path:
    """Where the verdict on this config, under these versions, is kept."""
    content = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"):
        content.pop(name, None)
    if getattr(config, "auto_map", None):
        content["_name_or_path"] = config.name_or_path  # its code is the repository's own
    versions = [PROBE, torch.__version__, transformers.__version__, lora_dpo.__version__]
    text = json.dumps([content, options, versions], sort_keys=True, default=str)
    return cache_folder() / "probes" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _read(file: Path) -> Verdict | None:
    """A verdict kept on disk, or None where there is none that can be read."""
    try:
        verdict = Verdict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return verdict if verdict.way in WAYS and isinstance(verdict.reason, str) else None


def _write(file: Path, verdict: Verdict) -> None:
    """Keep it; without a place to, the next run probes again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(dataclasses.asdict(verdict)))
    except (OSError, RunError):
        return
