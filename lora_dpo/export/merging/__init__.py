"""The streaming merge: base and adapter in, a plain transformers model's files out, a few rows at a time.

files.py        the files of a merged model; what was finished before a stop is taken over
merge.py        tensor by tensor: the base's rows, the adapter's update, rounded once
changes.py      what an adapter changes, parameter by parameter
conversions.py  tensors of a checkpoint that become parameters by transformers' rules, and back
quantized.py    a quantized weight, rows at a time
shards.py       safetensors files, read by rows and written as they come
kept.py         how much of an update survives being stored
"""
