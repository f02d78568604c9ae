"""vLLM behind `sample`: much faster on a card, for a second copy of the base in its memory (extra `vllm`).

What is promised is less than in memory: vLLM computes with kernels of its own, so that its policy is the
trained one up to rounding, and a response is a function of its seed only as far as vLLM's batching leaves it
so. Nothing here has run on a card yet: it is written to vLLM's documentation, and tested on a stand-in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from lora_dpo.errors import ModelError, RecipeError, RunError
from lora_dpo.model import find_adapter, read_adapter
from lora_dpo.recipe import Base, Sampling
from lora_dpo.reference import adapter_fingerprint
from lora_dpo.sampling.choosing import never_drawn
from lora_dpo.sampling.decoding import Response
from lora_dpo.sampling.noise import prompt_key

PROMPTS_AT_ONCE = 256
"""So many prompts are handed over at a time: vLLM fills its own batches; a kill loses at most these many."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank; its default is 16."""

TEMPERATURES = (0.01, 2.0)
"""vLLM raises lower ones to the first, with no more than a line in its log, and refuses higher ones."""

NEVER = -100.0
"""Added to the logits of tokens that are not drawn: the most that vLLM's documentation allows."""


@dataclass(frozen=True)
class VLLM:
    """A base, with or without an adapter's folder, that vLLM answers for; `sample` takes it as a model.

    adapter: a folder in PEFT's layout, or a run's. tokens: the longest prompt and response together. memory:
    the share of the card that vLLM takes. never: ids that are not drawn, such as rows of the head that belong
    to no token; see `vllm_never`. vLLM's engine starts at the first use; one made of this by
    `dataclasses.replace` with another adapter goes on with the same engine.
    """

    base: Base
    adapter: str | None = None
    tokens: int = 2048
    memory: float = 0.85
    never: tuple[int, ...] = ()
    _engine: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def sampler_id(self, settings: Sampling, stop_ids: Sequence[int], *, role: str = "policy") -> str:
        """As `lora_dpo.sampling.sampler_id`; never the same as that of a model in memory."""
        told = dataclasses.asdict(settings)
        del told["tokens_in_cache"]
        base = {name: getattr(self.base, name) for name in ("model", "revision", "quantization")}
        base["compute_dtype"] = self.base.compute_dtype
        adapter = _Lora.of(self.adapter).fingerprint if role == "policy" and self.adapter else None
        facts = ["vllm", base, adapter, told, sorted(stop_ids), self.tokens, sorted(self.never)]
        return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())

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
        """As `sample`, which calls this.

        Raises ModelError where vLLM or the adapter is missing, or vLLM can't be what the base or the adapter
        is; RecipeError for a temperature that it does not take; RunError for a prompt that leaves no room.
        """
        names = [prompt_key(ids) for ids in prompts] if keys is None else list(keys)
        self._check(prompts, names, settings, role)
        made: list[list[Response]] = [[] for _ in prompts]
        new = [n for n in range(len(prompts)) if n not in known]
        if not new:
            return made
        lora = _Lora.of(self.adapter) if role == "policy" and self.adapter else None
        request = _Request(self, settings, tuple(stop_ids), lora)
        for at in range(0, len(new), PROMPTS_AT_ONCE):
            group = new[at : at + PROMPTS_AT_ONCE]
            answers = request.answers([(names[n], list(map(int, prompts[n]))) for n in group])
            for n, responses in zip(group, answers, strict=True):
                made[n] = responses
                if done is not None:
                    done(n, responses)
            if progress is not None:
                progress(len(group))
        return made

    def _check(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], settings: Sampling, role: str
    ) -> None:
        if role not in ("policy", "base"):
            raise ModelError(f"vLLM answers as policy or base, not as {role}")
        if role == "policy" and self.adapter is None:
            raise ModelError("vLLM has no adapter to answer as the policy: give its folder, or role='base'")
        check_base_for_vllm(self.base)
        low, high = TEMPERATURES
        if not low <= settings.temperature <= high:
            raise RecipeError(
                f"sampling.temperature got {settings.temperature:g}; vLLM takes {low:g} to {high:g}. The"
                " model in memory takes any"
            )
        for n, ids in enumerate(prompts):
            if not 0 < len(ids) < self.tokens:
                raise RunError(
                    f"prompt {n + 1} ({names[n]}) has {len(ids):,} tokens;"
                    f" between 1 and {self.tokens - 1:,} fit"
                )

    def engine(self, vllm: Any, rank: int | None) -> Any:
        """vLLM's engine: the one there is, where it was made of the same. Raises ModelError."""
        options = self._options(rank)
        if self._engine.get("options") != options:
            self._engine.clear()  # the card has no room for two
            try:
                self._engine.update(llm=vllm.LLM(**options), options=options)
            except Exception as error:  # whatever vLLM, torch or the hub raise
                raise ModelError(
                    f"vLLM does not start on {self.base.model} ({type(error).__name__}: {error}). It needs a"
                    f" CUDA card with {self.memory:.0%} of its memory free; the model in memory needs neither"
                ) from error
        return self._engine["llm"]

    def _options(self, rank: int | None) -> dict[str, Any]:
        base = self.base
        # An engine that has room for an adapter answers for the base, too.
        known = self._engine.get("options", {}).get("max_lora_rank", 0)
        if rank is None and self.adapter is not None:
            rank = _Lora.of(self.adapter).rank
        if rank is not None and known >= rank:
            rank = known
        return {
            "model": base.model,
            "revision": base.revision,
            "trust_remote_code": base.trust_remote_code,
            "dtype": base.compute_dtype,
            "max_model_len": self.tokens,
            "gpu_memory_utilization": self.memory,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # else the checkpoint's own top-k and penalties would act
            **({} if base.quantization == "none" else {"quantization": "bitsandbytes"}),
            **({} if rank is None else {"enable_lora": True, "max_lora_rank": rank}),
        }


def check_base_for_vllm(base: Base) -> None:
    """Raise ModelError where vLLM would answer for other weights than those that the base has here."""
    nf4 = base.quantization == "nf4" and base.double_quantization
    if base.quantization != "none" and not nf4:
        raise ModelError(
            f"base.quantization={base.quantization}: vLLM quantizes to nf4 with double quantization, or not"
            " at all. Sample from the model in memory"
        )


def vllm_never(tokenizer: Any, rows: int, stop_ids: Sequence[int]) -> tuple[int, ...]:
    """`VLLM.never`: what a model in memory doesn't draw either. rows: of the head, a token each or none."""
    known, never = never_drawn(tokenizer, stop_ids)
    beyond = range(rows if known is None else known, rows)
    return tuple(sorted({*beyond, *(token for token in never if token < rows)}))


def seed_of(seed: int, key: str, response: int) -> int:
    """The seed of one response, below 2⁶³: a hash of (seed, key, which response)."""
    return xxhash.xxh3_64_intdigest(f"{key}\0{response}".encode(), seed) & (2**63 - 1)


@dataclass(frozen=True)
class _Lora:
    """An adapter as vLLM takes it. rank: the least of vLLM's that has room for it."""

    folder: Path
    rank: int
    fingerprint: str

    @classmethod
    def of(cls, path: str) -> _Lora:
        """Raises ModelError for one that vLLM refuses or computes otherwise."""
        folder = find_adapter(path, "the adapter")
        saved = read_adapter(str(folder), "the adapter", kind="policy")
        config = saved.config
        others = {
            "use_dora": config.use_dora,
            "modules_to_save": config.modules_to_save,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "trainable_token_indices": config.trainable_token_indices,
            "fan_in_fan_out": config.fan_in_fan_out,
            "bias": config.bias != "none",
        }
        wrong = [name for name, value in others.items() if value]
        rank = next((rank for rank in VLLM_RANKS if rank >= config.r), None)
        if wrong or rank is None:
            what = f"rank {config.r}, above {VLLM_RANKS[-1]}" if not wrong else ", ".join(wrong)
            raise ModelError(
                f"vLLM cannot answer with the adapter in {folder}: it has {what}. Sample from the model in"
                " memory, or merge the adapter and give vLLM that as its base"
            )
        return cls(folder, rank, adapter_fingerprint(saved.tensors, config.to_dict()))

    def request(self) -> Any:
        """Its name and number are its content's: what vLLM keeps of another adapter is never taken for it."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        number = 1 + int(self.fingerprint[:7], 16)
        return LoRARequest(f"policy-{self.fingerprint}", number, str(self.folder.resolve()))


@dataclass(frozen=True)
class _Request:
    """What all responses are asked for with."""

    of: VLLM
    settings: Sampling
    stop_ids: tuple[int, ...]
    lora: _Lora | None

    def answers(self, prompts: Sequence[tuple[str, list[int]]]) -> list[list[Response]]:
        """The responses to prompts, (key, ids) each.

        One request a response, with a seed of its own: what else is drawn changes no seed. The prompt's keys
        are shared by vLLM's prefix cache.
        """
        vllm = _module()
        engine = self.of.engine(vllm, None if self.lora is None else self.lora.rank)
        which = range(self.settings.responses)
        asked = [{"prompt_token_ids": ids} for _, ids in prompts for _ in which]
        how = [self._parameters(vllm, key, k, len(ids)) for key, ids in prompts for k in which]
        lora = {} if self.lora is None else {"lora_request": self.lora.request()}
        outputs = engine.generate(asked, how, use_tqdm=False, **lora)
        made = [self._response(output) for output in outputs]
        count = self.settings.responses
        return [made[at : at + count] for at in range(0, len(made), count)]

    def _parameters(self, vllm: Any, key: str, response: int, length: int) -> Any:
        return vllm.SamplingParams(
            n=1,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_tokens=min(self.settings.max_new_tokens, self.of.tokens - length),
            seed=seed_of(self.settings.seed, key, response),
            stop_token_ids=list(self.stop_ids),
            ignore_eos=True,  # the stop tokens are ours alone
            detokenize=False,
            # Not allowed_token_ids: each request would carry the whole vocabulary to vLLM's process.
            logit_bias=dict.fromkeys(self.of.never, NEVER) or None,
        )

    def _response(self, output: Any) -> Response:
        [completion] = output.outputs
        ids = [int(token) for token in completion.token_ids]
        # vLLM keeps the stop token among the ids.
        finished = bool(ids) and ids[-1] in self.stop_ids
        return Response(ids[:-1], True, ids[-1]) if finished else Response(ids, False)


def _module() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(
            f"vLLM cannot be imported ({error}): pip install 'lora-dpo[vllm]', or sample from the model in"
            " memory"
        ) from error
    return vllm
