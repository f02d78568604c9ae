"""The model card of an export: what is known of it, and nothing else.

card.py      the whole text and its front matter
facts.py     everything that is known, gathered
training.py  what it was trained from and on, and its objective
results.py   figures with intervals, and the proof
usage.py     how to load it
limits.py    what it is not good for, and what was not measured
curves.py    the run's curves as a picture
licence.py   the base's, where its own files say it
names.py     hub ids stay whole, local paths become their last part
markdown.py  strings of anybody in Markdown
"""
