"""What a run leaves on disk, and how: whole files, by one rename.

directory.py  the folder of a run and what lies in it
writing.py    files and folders that appear whole; room for them
lines.py      files of JSON lines that grow, and are gone on with
manifest.py   whether a folder is what was written
"""

from lora_dpo.run_directory.directory import OWN_NAMES, RunDirectory, cache_folder, holds_adapter, step_of
from lora_dpo.run_directory.lines import GrowingFile, growing
from lora_dpo.run_directory.manifest import MANIFEST, damage
from lora_dpo.run_directory.writing import (
    delete_folder,
    empty,
    grow_folder,
    in_words,
    need_space,
    write_folder,
    write_text,
)

__all__ = [
    "MANIFEST",
    "OWN_NAMES",
    "GrowingFile",
    "RunDirectory",
    "cache_folder",
    "damage",
    "delete_folder",
    "empty",
    "grow_folder",
    "growing",
    "holds_adapter",
    "in_words",
    "need_space",
    "step_of",
    "write_folder",
    "write_text",
]
