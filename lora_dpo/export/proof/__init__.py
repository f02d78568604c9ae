"""What an export kept of what was trained, on held-out rows: it is reloaded from disk and asked.

prove.py       base + adapter, then what was made; both bases side by side
rows.py        the held-out rows to compare on
said.py        what one model says on them
arithmetic.py  in float32 wherever there is room: then only storing makes a difference
comparing.py   log-probs, KL, top-1, accuracy, the margin kept
bars.py        stated numbers, from measurement, and which were missed
report.py      export_report.json, and lines for a person
"""
