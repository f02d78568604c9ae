"""A reward model on the one base as the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_dpo.judging.conversations import Conversations
from lora_dpo.judging.identity import adapter_content, base_content
from lora_dpo.judging.judges import Candidates, distinct, fingerprint
from lora_dpo.model import Model
from lora_dpo.recipe import Judge
from lora_dpo.reward import RewardModel  # pyright: ignore[reportMissingImports]
from lora_dpo.tokenization import ChatTokenizer


class RewardJudge:
    """Rewards of a trained reward model, a scalar head and an adapter beside the others on the base."""

    name = "reward"

    def __init__(
        self,
        judge: Judge,
        model: Model,
        chat: ChatTokenizer,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.reward_model = RewardModel.put_on(model, judge.what, chat)
        self._conversations = Conversations(model.tokenizer, chat.chat_template)
        self.fingerprint = fingerprint(
            "reward", base_content(model, say), adapter_content(judge.what), chat.chat_template
        )

    def __call__(
        self, group: Sequence[Candidates], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raises DataError or ModelError, naming the prompt, where the template refuses one."""
        found = [distinct(candidates.responses) for candidates in group]
        branches = [
            self._conversations.branches(candidates, response)
            for candidates, (responses, _) in zip(group, found, strict=True)
            for response in responses
        ]
        flat = iter(self.reward_model.rewards(branches))
        rewards = []
        for responses, places in found:
            own = [next(flat) for _ in responses]
            rewards.append([own[place] for place in places])
        if progress is not None:
            progress(len(group))
        return rewards
