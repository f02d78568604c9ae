"""Prompts with a response, as the tokens of a whole conversation, never cut."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lora_dpo.judging.judges import Candidates, where
from lora_dpo.preferences import Demonstration
from lora_dpo.tokenization import Branches, ChatTokenizer

NO_LIMIT = 2**30
"""Tokens; a judge sees what was said, not the part of it that training would."""


class Conversations:
    """A judge's tokenizer and template. What looks like a control token in a prompt or a response is text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        self._chat = ChatTokenizer(tokenizer, chat_template, max_tokens=NO_LIMIT)

    def branches(self, candidates: Candidates, response: str) -> Branches:
        """One side: the prompt, then this response, whose tokens are scored. Raises DataError, ModelError."""
        answer = (
            response if isinstance(candidates.prompt, str) else ({"role": "assistant", "content": response},)
        )
        record = Demonstration(
            candidates.prompt, answer, where(candidates), candidates.tools, candidates.template_kwargs
        )
        return self._chat.branches(record)
