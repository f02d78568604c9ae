"""A language model behind an OpenAI-compatible endpoint as the judge.

asking.py      two responses → what is asked, and what counts as an answer
client.py      one call: its errors, retries and key
transport.py   HTTP with one deadline for a whole answer; what a server writes, made harmless
schedule.py    which responses of a prompt are compared, and the reward that follows
workers.py     several calls at a time, ended at once by Ctrl-C
judge.py       all of it together
"""

from lora_dpo.judging.endpoint.judge import EndpointJudge

__all__ = ["EndpointJudge"]
