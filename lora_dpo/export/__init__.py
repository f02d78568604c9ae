"""From a run to what is served elsewhere, and what of the training came along.

source.py     what is exported: an adapter and its base
making.py     each kind of export: made, compared, described, put in its place

A streaming merge
merged.py     the files of a merged model; what was finished before a stop is taken over
merging.py    tensor by tensor: the base's rows, the adapter's update, rounded once
changes.py    what an adapter changes, parameter by parameter
conversions.py  tensors of a checkpoint that become parameters by transformers' rules, and back
quantized.py  a quantized weight, rows at a time
shards.py     safetensors files, read by rows and written as they come
kept.py       how much of an update survives being stored
"""

from lora_dpo.export.adapter import export_adapter, refuse_existing
from lora_dpo.export.making import (
    Options,
    export,
    export_merged,
    export_to_gguf,
    export_to_gguf_adapter,
    export_to_ollama,
)
from lora_dpo.export.report import Report, describe
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
