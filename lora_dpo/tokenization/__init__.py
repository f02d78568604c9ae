"""Chat template, truncation, and what is scored: records become branches.

The way of a record: `control` marks its content, `rendering` puts it through the chat template, `turns`
finds the scored turns in the text, `encoding` makes tokens, `truncation` cuts them to length, `branches`
shares what the sides have in common in front. `chat` puts them together for one record, `corpus` for all.

For many records: `outcomes` is what becomes of them, `work_queue` deals them out, `processes` are workers
that run `worker`, `cache` keeps what is done; `flat` and `portable` are the forms in which results and tasks
travel.
"""

from lora_dpo.tokenization.branches import Branches, share
from lora_dpo.tokenization.chat import ChatTokenizer
from lora_dpo.tokenization.corpus import tokenize
from lora_dpo.tokenization.outcomes import Tokenized
from lora_dpo.tokenization.truncation import Dropped

__all__ = ["Branches", "ChatTokenizer", "Dropped", "Tokenized", "share", "tokenize"]
