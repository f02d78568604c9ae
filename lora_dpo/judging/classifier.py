"""A transformers sequence-classification model as the judge, with its own tokenizer.

Legend: `B` conversations of a batch, `T` tokens of the longest one, `C` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_dpo.errors import RunError
from lora_dpo.judging.conversations import Conversations
from lora_dpo.judging.judges import Candidates, distinct, fingerprint
from lora_dpo.judging.loading import Classifier, load_classifier
from lora_dpo.out_of_memory import give_back_memory, is_out_of_memory
from lora_dpo.recipe import Judge


class ClassifierJudge:
    """A reward is the model's one output; of several labels, the log-probability of the named one (for a
    model that was trained by regression, its output).

    With a chat template the conversation is rendered with it; without one, prompt and response are a pair of
    texts. Conversations longer than the model takes lose their front; how many did is in `notes`.
    """

    name = "classifier"
    whole_groups = True

    def __init__(self, judge: Judge, say: Callable[[str], None] = lambda line: None):
        self._loaded: Classifier = load_classifier(judge, say)
        self._budget, self._say = judge.tokens_per_microbatch, say
        self._judged = self._cut = 0
        tokenizer = self._loaded.tokenizer
        self._conversations = Conversations(tokenizer) if tokenizer.chat_template else None
        self.fingerprint = fingerprint(
            "classifier",
            self._loaded.content,
            self._loaded.limit,
            self._loaded.label,
            tokenizer.chat_template,
        )

    def __call__(
        self, group: Sequence[Candidates], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raises RunError where one conversation alone does not fit in memory; DataError, ModelError, naming
        the prompt, where the template refuses one.
        """
        found = [distinct(candidates.responses) for candidates in group]
        inputs = [
            self._inputs(candidates, response)
            for candidates, (responses, _) in zip(group, found, strict=True)
            for response in responses
        ]
        flat = iter(self._rewards(inputs))
        rewards = []
        for responses, places in found:
            own = [next(flat) for _ in responses]
            rewards.append([own[place] for place in places])
        if progress is not None:
            progress(len(group))
        return rewards

    def notes(self) -> list[str]:
        """What was cut."""
        if not self._cut:
            return []
        limit = f"{self._loaded.limit} tokens that {self._loaded.model} takes"
        return [
            f"{self._cut} of {self._judged} conversations were longer than the {limit}: their front was cut"
        ]

    def _inputs(self, candidates: Candidates, response: str) -> dict[str, list[int]]:
        """Token ids, and token types where the model has them, within the limit."""
        limit = self._loaded.limit
        self._judged += 1
        if self._conversations is None or isinstance(candidates.prompt, str):
            made = self._pair(_text(candidates.prompt), response)
            if len(made["input_ids"]) > limit:
                self._cut += 1
                made = self._pair(_text(candidates.prompt), response, limit)
            return made
        ids = self._conversations.branches(candidates, response).side(0).tolist()
        if len(ids) > limit:
            self._cut += 1
            lead = int(ids[0] == self._loaded.tokenizer.bos_token_id)
            ids = ids[:lead] + ids[len(ids) - limit + lead :]
        return {"input_ids": ids}

    def _pair(self, prompt: str, response: str, limit: int | None = None) -> dict[str, list[int]]:
        """Two texts, joined as the tokenizer joins them; what looks like a control token in them is text."""
        tokenizer = self._loaded.tokenizer
        cut: dict[str, Any] = {"truncation": "longest_first", "max_length": limit} if limit else {}
        made: Any = tokenizer(prompt, response, split_special_tokens=True, verbose=False, **cut)
        return {k: list(made[k]) for k in ("input_ids", "token_type_ids") if k in made}

    def _rewards(self, inputs: Sequence[dict[str, list[int]]]) -> list[float]:
        rewards = [0.0] * len(inputs)
        lengths = [len(item["input_ids"]) for item in inputs]
        left, budget = sorted(range(len(inputs)), key=lambda n: lengths[n]), self._budget
        while left:
            batch = self._first_batch(left, lengths, budget)
            try:
                made = self._forward([inputs[n] for n in batch])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise RunError(_does_not_fit(lengths[batch[0]])) from error
                made = None
            if made is None:
                # Outside the handler: its traceback holds the failed forward's tensors.
                give_back_memory()
                budget = len(batch) // 2 * lengths[batch[-1]]
                self._say(f"out of memory while judging: it goes on with {budget} tokens at a time")
                continue
            for n, reward in zip(batch, made, strict=True):
                rewards[n] = reward
            left = left[len(batch) :]
        return rewards

    def _first_batch(self, order: Sequence[int], lengths: Sequence[int], budget: int) -> list[int]:
        """The first numbers of the order, shortest first, that fit in the budget together, padded."""
        # Without a token to pad with, transformers can't find where the conversations of a batch end.
        most = len(order) if self._loaded.pad is not None else 1
        count = 1
        while count < most and (count + 1) * lengths[order[count]] <= budget:
            count += 1
        return list(order[:count])

    @torch.no_grad()
    def _forward(self, inputs: Sequence[dict[str, list[int]]]) -> list[float]:
        network, pad = self._loaded.network, self._loaded.pad or 0
        longest = max(len(item["input_ids"]) for item in inputs)
        device = next(network.parameters()).device

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

        ids = [item["input_ids"] for item in inputs]
        arguments = {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }
        if "token_type_ids" in inputs[0]:
            arguments["token_type_ids"] = padded([item["token_type_ids"] for item in inputs], 0)
        logits = network(**arguments).logits.double()  # [B, C]
        return self._loaded.rewards(logits).tolist()


def _does_not_fit(length: int) -> str:
    return f"judge: a conversation of {length} tokens does not fit in memory: lower judge.max_tokens"


def _text(prompt: Any) -> str:
    """A prompt for a model without a template: the only message's text, or every message with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
