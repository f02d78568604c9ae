"""A plain transformers model out of a base and an adapter, written to disk as it is made.

What is half made waits in a hidden folder beside its place: shards that are whole there are not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_dpo.errors import ModelError
from lora_dpo.export.merging.changes import changes_of, check_brought
from lora_dpo.export.merging.kept import Kept
from lora_dpo.export.merging.merge import Merge
from lora_dpo.export.merging.shards import Part, Tensors, shards_of, write_shard
from lora_dpo.model import load_config
from lora_dpo.model.skeleton import Skeleton, skeleton_of
from lora_dpo.model.stored import weight_files
from lora_dpo.model.trust import INDEX
from lora_dpo.recipe import Base
from lora_dpo.run_directory import empty, need_space, write_text

SHARD_SIZE = 4 * 10**9
"""Bytes of a file of weights, unless something else is asked for."""

PLAN = "merge.json"
"""In a folder that is not whole yet: what is being made there."""

GENERATION = "generation_config.json"

LAYOUT = 1
"""Raise it when the same base and adapter give other files: what was begun before is then begun again."""


@dataclass(frozen=True)
class Settings:
    """How a merged model is stored. original: whether the update is added to the base's weights as the
    checkpoint holds them, not to those that were trained on (see `Merge`).
    """

    dtype: torch.dtype = torch.bfloat16
    original: bool = False
    shard_size: int = SHARD_SIZE


def merge(
    base: Base,
    adapter: Path,
    folder: Path,
    settings: Settings,
    *,
    counting: Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]],
) -> dict[str, Kept]:
    """Write the merged model's weights and config into a folder; returns what was kept, by tensor.

    Shards that an earlier call finished there are taken over. counting: opens a display of so many bytes.
    Raises ModelError for what can't be merged, RunError where there is no room, OSError.
    """
    skeleton = skeleton_of(base)
    if settings.original and skeleton.stored is not None:
        raise ModelError(
            f"--base original: {base.model} is stored quantized; there are no other weights to merge into"
        )
    with Tensors(weight_files(base)) as weights, Tensors([adapter / "adapter_model.safetensors"]) as factors:
        changes = changes_of(skeleton, adapter)
        check_brought(skeleton, changes, factors, weights)
        job = Merge(skeleton, weights, factors, changes, settings.dtype, settings.original)
        shards = shards_of(job.parts(), settings.shard_size)
        identity = _identity(base, skeleton, [*weights.files, adapter], settings)
        done = _Done(folder, identity, shards)
        done.begin()
        try:
            with counting("merging", done.missing_bytes) as advance:
                for number in done.missing():
                    write_shard(done.part_of(number), shards[number], advance)
                    done.finish(number, {part.name: job.kept.pop(part.name, None) for part in shards[number]})
        except ModelError:  # it would be raised again: what was made is of no use
            empty(folder)
            raise
        _write_config(skeleton, weights.files[0].parent, folder, settings, tied=not job.untied)
        return done.kept()


class _Done:
    """The shards of a folder that is being filled, and what was measured while they were made."""

    def __init__(self, folder: Path, identity: str, shards: Sequence[Sequence[Part]]):
        self.folder, self.shards = folder, shards
        self.names = ["model.safetensors"]
        if len(shards) > 1:
            self.names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        if self._plan() != identity:
            empty(folder)
        self.identity = identity

    def begin(self) -> None:
        """Raise RunError where there is no room for what is missing; else say what is made here."""
        need_space(self.folder, self.missing_bytes, "the merged model")
        write_text(self.folder / PLAN, self.identity)

    def _plan(self) -> str | None:
        with contextlib.suppress(OSError, ValueError):
            return (self.folder / PLAN).read_text(encoding="utf-8")
        return None

    def missing(self) -> list[int]:
        return [n for n, name in enumerate(self.names) if not (self.folder / name).is_file()]

    @property
    def missing_bytes(self) -> int:
        return sum(part.size for n in self.missing() for part in self.shards[n])

    def part_of(self, number: int) -> Path:
        return self.folder / f"{self.names[number]}.part"

    def _measured(self, number: int) -> Path:
        return self.folder / f"{self.names[number]}.kept.json"

    def finish(self, number: int, kept: dict[str, Kept | None]) -> None:
        values = {name: dataclasses.asdict(one) for name, one in kept.items() if one is not None}
        write_text(self._measured(number), json.dumps(values))
        os.replace(self.part_of(number), self.folder / self.names[number])

    def kept(self) -> dict[str, Kept]:
        """What was kept, by tensor; then nothing but the model itself is left in the folder."""
        found: dict[str, Kept] = {}
        for number in range(len(self.shards)):
            text = self._measured(number).read_text(encoding="utf-8")
            found |= {name: Kept(**values) for name, values in json.loads(text).items()}
        if len(self.shards) > 1:
            places = {p.name: n for n, parts in zip(self.names, self.shards, strict=True) for p in parts}
            total = sum(part.size for parts in self.shards for part in parts)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        return found


def clear(folder: Path) -> None:
    """Remove what is only of use while a folder is being filled. Raises OSError."""
    for file in (folder / PLAN, *folder.glob("*.kept.json"), *folder.glob("*.part")):
        file.unlink(missing_ok=True)


def _identity(base: Base, skeleton: Skeleton, files: Sequence[Path], settings: Settings) -> str:
    """What must be the same for shards that are there to be of use: everything that they come from."""
    inside = [file for path in files for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    facts = [LAYOUT, str(base), str(settings), str(skeleton.device), str(skeleton.compute_dtype)]
    for file in inside:
        status = file.stat()
        facts.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() + "\n"


def _write_config(skeleton: Skeleton, source: Path, folder: Path, settings: Settings, *, tied: bool) -> None:
    """config.json without quantization, what the base says of generation, and code that comes with it."""
    config: Any = load_config(skeleton.base)
    config.dtype = settings.dtype
    text = config.get_text_config()
    if not tied:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    if getattr(config, "architectures", None) is None:
        config.architectures = [type(skeleton.network).__name__]
    config.save_pretrained(str(folder))
    # transformers no longer writes tokenizer.model, which llama.cpp's converter wants of some.
    names = [GENERATION, "tokenizer.model", *(("*.py",) if getattr(config, "auto_map", None) else ())]
    for file in (file for name in names for file in source.glob(name)):
        shutil.copyfile(file, folder / file.name)
