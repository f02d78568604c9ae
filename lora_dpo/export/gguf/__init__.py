"""GGUF by llama.cpp's own converters, and a look at what they wrote.

making.py     a model's file, an adapter's file
converter.py  the converters: found, run, ended with us
adapter.py    which adapters llama.cpp has a place for
check.py      the file's tensors beside the source's
metadata.py   its metadata, vocabulary, template and end-of-turn beside the source's
names.py      names and layouts that the converter gives
file.py       a GGUF file, through the `gguf` package
tensors.py    the source's tensors
"""
