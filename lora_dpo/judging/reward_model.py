"""A reward model on the one base as the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_dpo.judging.identity import base_content
from lora_dpo.judging.judges import Candidates, distinct, fingerprint, where
from lora_dpo.model import Model
from lora_dpo.recipe import Judge
from lora_dpo.reward import RewardModel
from lora_dpo.tokenization import ChatTokenizer


class RewardJudge:
    """Rewards of a trained reward model: an adapter and a scalar head beside the others on the base.

    chat: its limits are the reward model's. `reward_model.model` is the base with it on.
    """

    name = "reward"
    whole_groups = True

    def __init__(
        self,
        judge: Judge,
        model: Model,
        chat: ChatTokenizer,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.reward_model = RewardModel.put_on(model, judge.what, chat, key="judge.of", say=say)
        self._budget, self._say = judge.tokens_per_microbatch, say
        self.fingerprint = fingerprint(
            "reward", base_content(model, say), self.reward_model.fingerprint, chat.settings()
        )

    def __call__(
        self, group: Sequence[Candidates], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raises DataError or ModelError, naming the prompt, where the template refuses one."""
        found = [distinct(candidates.responses) for candidates in group]
        branches = [
            self.reward_model.branches(
                candidates.prompt,
                texts,
                tools=candidates.tools,
                template_kwargs=candidates.template_kwargs,
                where=where(candidates),
            )
            for candidates, (texts, _) in zip(group, found, strict=True)
        ]
        made = self.reward_model.rewards(branches, tokens_per_microbatch=self._budget, say=self._say)
        if progress is not None:
            progress(len(group))
        return [[own[place] for place in places] for own, (_, places) in zip(made, found, strict=True)]
