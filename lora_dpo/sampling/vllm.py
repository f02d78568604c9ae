"""vLLM behind `sample`: much faster on a card, for a second copy of the base in its memory (extra `vllm`).

What is promised is less than in memory: vLLM quantizes for itself, so that its policy is the trained one up
to rounding, and a response is a function of its seed only as far as vLLM's batching leaves it so. Nothing
here has been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from lora_dpo.errors import ModelError, RunError
from lora_dpo.recipe import Base, Sampling
from lora_dpo.sampling.decoding import Response
from lora_dpo.sampling.noise import prompt_key

PROMPTS_AT_ONCE = 256
"""So many prompts are handed over at a time: vLLM fills its own batches; a kill loses at most these many."""

QUANTIZED = ("nf4", "fp4")


@dataclass(frozen=True)
class VLLM:
    """A base, with or without an adapter's folder, that vLLM answers for; `sample` takes it as a model.

    rank: the adapter's, or more. tokens: the longest prompt and response together. memory: the share of the
    card that vLLM takes. ids: of the tokens that may be drawn; all where it is None.
    """

    base: Base
    adapter: str | None = None
    rank: int = 16
    tokens: int = 2048
    memory: float = 0.85
    ids: int | None = None
    _engine: list[Any] = field(default_factory=list, repr=False, compare=False)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        *,
        stop_ids: Sequence[int],
        role: str,
        keys: Sequence[str] | None,
        known: Collection[int],
        done: Callable[[int, list[Response]], None] | None,
        progress: Callable[[int], None] | None,
    ) -> list[list[Response]]:
        """As `sample`, which calls this. Raises ModelError where vLLM or the adapter is missing, RunError for
        a prompt that leaves no room.
        """
        if role not in ("policy", "base"):
            raise ModelError(f"vLLM answers as policy or base, not as {role}")
        if role == "policy" and self.adapter is None:
            raise ModelError("vLLM has no adapter to answer as the policy: give its folder, or role='base'")
        names = [prompt_key(ids) for ids in prompts] if keys is None else list(keys)
        for n, ids in enumerate(prompts):
            if not 0 < len(ids) < self.tokens:
                raise RunError(
                    f"prompt {n + 1} ({names[n]}) has {len(ids):,} tokens;"
                    f" between 1 and {self.tokens - 1:,} fit"
                )
        made: list[list[Response]] = [[] for _ in prompts]
        new = [n for n in range(len(prompts)) if n not in known]
        for at in range(0, len(new), PROMPTS_AT_ONCE):
            group = new[at : at + PROMPTS_AT_ONCE]
            answers = self._answers(group, prompts, names, settings, stop_ids, role)
            for n in group:
                made[n] = answers[n]
                if done is not None:
                    done(n, made[n])
            if progress is not None:
                progress(len(group))
        return made

    def _answers(
        self,
        group: Sequence[int],
        prompts: Sequence[Sequence[int]],
        names: Sequence[str],
        settings: Sampling,
        stop_ids: Sequence[int],
        role: str,
    ) -> dict[int, list[Response]]:
        """One request for each response, with a seed of its own: what is drawn with it changes no seed. The
        prompt's keys are shared by vLLM's prefix cache.
        """
        vllm = _module()
        asked, how = [], []
        for n in group:
            for k in range(settings.responses):
                asked.append({"prompt_token_ids": list(prompts[n])})
                room = min(settings.max_new_tokens, self.tokens - len(prompts[n]))
                how.append(
                    self._parameters(vllm, settings, seed_of(settings.seed, names[n], k), room, stop_ids)
                )
        lora = {}
        if role == "policy":
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            lora = {"lora_request": LoRARequest("policy", 1, self.adapter)}
        outputs = iter(self._llm(vllm).generate(asked, how, use_tqdm=False, **lora))
        return {n: [_response(next(outputs), stop_ids) for _ in range(settings.responses)] for n in group}

    def _parameters(
        self, vllm: Any, settings: Sampling, seed: int, room: int, stop_ids: Sequence[int]
    ) -> Any:
        return vllm.SamplingParams(
            n=1,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=room,
            seed=seed,
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # the stop tokens are ours alone
            detokenize=False,
            allowed_token_ids=None if self.ids is None else list(range(self.ids)),
        )

    def _llm(self, vllm: Any) -> Any:
        """vLLM's engine, made at the first use."""
        if not self._engine:
            base = self.base
            quantization = {"quantization": "bitsandbytes"} if base.quantization in QUANTIZED else {}
            lora = {"enable_lora": True, "max_lora_rank": self.rank} if self.adapter else {}
            engine = vllm.LLM(
                model=base.model,
                revision=base.revision,
                trust_remote_code=base.trust_remote_code,
                dtype=base.compute_dtype,
                max_model_len=self.tokens,
                gpu_memory_utilization=self.memory,
                enable_prefix_caching=True,
                generation_config="vllm",  # else the checkpoint's own top-k and penalties would act
                **quantization,
                **lora,
            )
            self._engine.append(engine)
        return self._engine[0]


def seed_of(seed: int, key: str, response: int) -> int:
    """The seed of one response, below 2⁶³: a hash of (seed, key, which response)."""
    return xxhash.xxh3_64_intdigest(f"{key}\0{response}".encode(), seed) & (2**63 - 1)


def _response(output: Any, stop_ids: Sequence[int]) -> Response:
    [completion] = output.outputs
    ids = np.asarray(completion.token_ids, dtype=np.int64).tolist()
    # vLLM keeps the stop token among the ids.
    finished = bool(ids) and ids[-1] in set(stop_ids)
    return Response(ids[:-1] if finished else ids, finished)


def _module() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(
            f"vLLM cannot be imported ({error}): pip install 'lora-dpo[vllm]', or sample from the model in"
            " memory"
        ) from error
    return vllm
