"""The policy's own implicit reward as the judge.

r(x, y) = β (log π(y|x) − log ref(y|x)), Rafailov et al. 2023 (arXiv:2305.18290), equation 5, without the part
that all responses to x share. Per token it is divided by |y|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from peft import PeftModel
from torch import Tensor

from lora_dpo.batching import MicroBatch
from lora_dpo.evaluation import each_microbatch
from lora_dpo.judging.conversations import Conversations
from lora_dpo.judging.identity import base_content, model_fingerprint
from lora_dpo.judging.judges import Candidates, distinct, fingerprint, where
from lora_dpo.logprobs import token_logprobs
from lora_dpo.model import Model, as_policy
from lora_dpo.reference import reference_logprobs
from lora_dpo.tokenization import Branches, ChatTokenizer, share

BETA = 0.1
"""Where neither the judge's options nor a run's recipe says."""


class ImplicitJudge:
    """Rewards of the model's policy against its reference, in the roles that they have.

    Responses count whole, with their end-of-turn; of one that is known to be unfinished, without. per_token:
    divide by the number of tokens that count. Where no adapter is on, the policy is its reference and every
    reward is 0.0, which `say` is told; nothing is computed then.
    """

    name = "implicit"
    whole_groups = True

    def __init__(
        self,
        model: Model,
        chat: ChatTokenizer,
        *,
        beta: float = BETA,
        per_token: bool = False,
        tokens_per_microbatch: int = 8192,
        say: Callable[[str], None] = lambda line: None,
    ):
        names = {*model.policy_adapters, *model.reference_adapters}
        network = model.network
        self._adapted = isinstance(network, PeftModel) and not names.isdisjoint(network.peft_config)
        if not self._adapted:
            say("implicit rewards: no adapter is on, so the policy is its reference, and every reward is 0")
        self.model, self.beta, self.per_token = model, beta, per_token
        self._budget, self._say = tokens_per_microbatch, say
        self._conversations = Conversations(model.tokenizer, chat.chat_template)
        policy = model_fingerprint(model, say) if self._adapted else base_content(model, say)
        self.fingerprint = fingerprint("implicit", policy, chat.chat_template, beta, per_token)

    def __call__(
        self, group: Sequence[Candidates], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Raises DataError or ModelError, naming the prompt, where the template refuses one."""
        if not self._adapted:
            if progress is not None:
                progress(len(group))
            return [[0.0] * len(candidates.responses) for candidates in group]
        made = [self._branches(candidates) for candidates in group]
        rewards: list[list[float]] = [[] for _ in group]
        for numbers in _alike([item for item, _ in made]):

            def act(batch: MicroBatch, examples: list[int], numbers: list[int] = numbers) -> None:
                for example, row in zip(examples, self._of_batch(batch).tolist(), strict=True):
                    number = numbers[example]
                    rewards[number] = [row[place] for place in made[number][1]]

            each_microbatch(
                self.model,
                [made[n][0] for n in numbers],
                act,
                tokens_per_microbatch=self._budget,
                progress=progress,
                say=self._say,
            )
        return rewards

    def _of_batch(self, batch: MicroBatch) -> Tensor:
        """Rewards of a micro-batch: float64 [examples, sides], on the CPU."""
        reference = reference_logprobs(self.model, batch)
        with as_policy(self.model):
            policy = token_logprobs(self.model, batch)
        rewards = self.beta * batch.per_sequence(policy.double() - reference.double())
        if self.per_token:
            rewards = rewards / batch.scored_lengths().clamp(min=1)
        return rewards.cpu()

    def _branches(self, candidates: Candidates) -> tuple[Branches, list[int]]:
        """[prompt | different responses …], and which of those each response is."""
        finished = candidates.finished or (True,) * len(candidates.responses)
        texts, places = distinct(list(zip(candidates.responses, finished, strict=True)))
        sides, masks = [], []
        for response, ended in texts:
            item = self._conversations.branches(candidates, response)
            mask = item.scored[0].copy()
            if not ended and mask.sum() > 1:
                mask[np.flatnonzero(mask)[-1]] = False  # an end-of-turn that nobody said
            sides.append(item.side(0))
            masks.append(mask)
        return share(sides, masks, where(candidates)), places


def _alike(items: Sequence[Branches]) -> Iterator[list[int]]:
    """The numbers of items with the same count of sides, as micro-batches need them."""
    for sides in sorted({item.sides for item in items}):
        yield [n for n, item in enumerate(items) if item.sides == sides]
