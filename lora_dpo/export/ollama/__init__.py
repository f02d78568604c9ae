"""A Modelfile for Ollama.

modelfile.py    the whole file
chat_turns.py   what a chat template puts around turns, found out by rendering
go_template.py  the same in Ollama's template language
"""
