"""Iterative DPO and rejection sampling: rounds of sampling, judging, pairing and training on the one base.

directory.py   what a loop leaves on disk
prompts.py     its prompts, split once and dealt out
policies.py    who speaks in which round, and the recipe of each round's run
stages.py      sample, judge, pair, train, measure: each goes on where it was
judges.py      looked at first, and the same to the end
measuring.py   reward, KL and the guard's figures of a policy
telling.py     which round was best, when to stop, the table
loop.py        all of it in order
"""

from lora_dpo.rounds.directory import LoopDirectory, RoundDirectory
from lora_dpo.rounds.loop import run_rounds

__all__ = ["LoopDirectory", "RoundDirectory", "run_rounds"]
