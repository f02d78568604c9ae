"""A standalone adapter in PEFT's layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_dpo.export.source import Source
from lora_dpo.run_directory import MANIFEST, RunDirectory, need_space, write_folder


def export_adapter(source: Source | RunDirectory, to: Path) -> Path:
    folder = source.adapter_folder if isinstance(source, RunDirectory) else source.adapter
    need_space(to, sum(file.stat().st_size for file in folder.iterdir()), "the adapter")

    def fill(part: Path) -> None:
        for file in folder.iterdir():
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, part / file.name)

    write_folder(to, fill)
    return to
