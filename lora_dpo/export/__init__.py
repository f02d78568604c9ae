"""From a run to what is served elsewhere, and how much of the training came along.

source.py   what is exported: an adapter and its base
destination.py  where it goes
kinds.py    every kind of export by its name
making.py   a merged model: made, compared, described, and only then put in its place
adapter.py  the adapter alone, in PEFT's layout
merging/    the streaming merge
proof/      what was made, reloaded, beside base + adapter
card/       the model card
gguf/       llama.cpp's files, by its own converters
ollama/     Modelfiles
serving/    what servers will choke on, and the commands that work
push.py     to the hub
"""

from lora_dpo.export.adapter import export_adapter
from lora_dpo.export.destination import refuse_existing
from lora_dpo.export.kinds import export, export_to_gguf, export_to_gguf_adapter, export_to_ollama
from lora_dpo.export.making import Options, export_merged
from lora_dpo.export.proof.report import Report, describe
from lora_dpo.export.source import Source, find_source

__all__ = [
    "Options",
    "Report",
    "Source",
    "describe",
    "export",
    "export_adapter",
    "export_merged",
    "export_to_gguf",
    "export_to_gguf_adapter",
    "export_to_ollama",
    "find_source",
    "refuse_existing",
]
