"""What a child has around the package's functions: flags that say where it is, and places where it waits."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nursery import Flags

PHASES = (
    "load",
    "tokenise",
    "reference",
    "forward",
    "backward",
    "optimizer step",
    "evaluation",
    "save",
    "export",
)


def install(flags: Flags, request: dict[str, Any]) -> None:
    """Called in the child before the command, with what `Nursery.start` was given."""
    count_writing(flags)
    count_steps(flags)
    if request["pause"] is not None:
        wait_in(request["pause"], request["at"], request["after"], flags)
    if request["blind"]:
        replace_everywhere("lora_dpo.run_directory", "need_space", lambda _: lambda *given: None)
    if request["fail"] is not None:
        import failing

        failing.arm(flags, **request["fail"])


def replace_everywhere(module: str, name: str, around: Callable[[Callable], Callable]) -> None:
    """Put a wrapper around a function of the package in every module that imported it."""
    old = getattr(sys.modules[module], name)
    new = functools.wraps(old)(around(old))
    for place in [m for n, m in sys.modules.items() if n.startswith("lora_dpo")]:
        if getattr(place, name, None) is old:
            setattr(place, name, new)


def count_writing(flags: Flags) -> None:
    """Keep the flags of saves, rotations and the last writing of adapters."""

    def timed(kind: int, microseconds: str, times: str, work: Callable[[], Any]) -> Any:
        flags["inside"], flags["entered"] = kind, flags["entered"] + 1
        began = time.monotonic_ns()
        try:
            return work()
        finally:
            flags[microseconds] += (time.monotonic_ns() - began) // 1000
            flags[times] += 1
            flags["inside"] = 0

    def around_write(old: Callable) -> Callable:
        def write_folder(folder: Path, *given: Any, **named: Any) -> None:
            if not folder.name.startswith("step-"):
                timed(3, "finish_us", "finishes", lambda: old(folder, *given, **named))
                return
            timed(1, "save_us", "saves", lambda: old(folder, *given, **named))
            flags["saved"] = int(folder.name.removeprefix("step-"))

        return write_folder

    def around_delete(old: Callable) -> Callable:
        return lambda *given: timed(2, "rotation_us", "rotations", lambda: old(*given))

    replace_everywhere("lora_dpo.run_directory", "write_folder", around_write)
    replace_everywhere("lora_dpo.run_directory", "delete_folder", around_delete)


def count_steps(flags: Flags) -> None:
    from lora_dpo.run_directory import RunDirectory

    old = RunDirectory.append_record

    def append_record(self: RunDirectory, record: Mapping[str, Any]) -> None:
        old(self, record)
        flags["step"] = record["step"]

    RunDirectory.append_record = append_record


def wait_in(phase: str, at: int, after: int, flags: Flags) -> None:
    """Have the child wait for the flag `go` inside this phase, the `at`-th time that it is there once the
    step `after` is done.
    """
    times = 0

    def here() -> None:
        nonlocal times
        times += flags["step"] >= after
        if times != at or flags["go"]:
            return
        flags["paused"] = 1
        try:
            while not flags["go"]:
                time.sleep(0.001)
        finally:
            flags["paused"] = 0

    PLACES[phase](here)


def _load(here: Callable[[], None]) -> None:
    from transformers import PreTrainedModel

    old = PreTrainedModel.from_pretrained.__func__  # pyright: ignore

    def from_pretrained(*given: Any, **named: Any) -> Any:
        here()
        return old(*given, **named)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # pyright: ignore


def _tokenise(here: Callable[[], None]) -> None:
    from lora_dpo.tokenization import ChatTokenizer

    _before(ChatTokenizer, "branches", here)


def _reference(here: Callable[[], None]) -> None:
    replace_everywhere("lora_dpo.reference", "reference_logprobs", _after(here))


def _forward(here: Callable[[], None]) -> None:
    """In the policy's forward pass with gradients, after the backbone's part."""

    def in_training() -> None:
        if torch.is_grad_enabled() and torch._C._current_autograd_node() is None:
            here()

    replace_everywhere("lora_dpo.logprobs", "token_logprobs", _after(in_training))


def _backward(here: Callable[[], None]) -> None:
    """In a hook that autograd calls, with Python above and below."""
    old = torch.Tensor.backward

    def backward(loss: torch.Tensor, *given: Any, **named: Any) -> None:
        loss.register_hook(lambda _: here())
        old(loss, *given, **named)

    torch.Tensor.backward = backward  # pyright: ignore


def _optimizer_step(here: Callable[[], None]) -> None:
    """After the parameters changed and before anything knows."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: here())


def _evaluation(here: Callable[[], None]) -> None:
    import lora_dpo.evaluation as evaluation

    evaluation.batch_logprobs = _after(here)(evaluation.batch_logprobs)


def _save(here: Callable[[], None]) -> None:
    _in_folder(here, "step-")


def _export(here: Callable[[], None]) -> None:
    """In the writing of adapter/ at the end of a run, or of what `export` makes."""
    _in_folder(here, "adapter", "merged", "export")


def _in_folder(here: Callable[[], None], *names: str) -> None:
    """Once a folder's files are written, and it is not in its place yet."""

    def around(old: Callable) -> Callable:
        def write_folder(folder: Path, fill: Callable[[Path], None], **named: Any) -> None:
            def then_wait(part: Path) -> None:
                fill(part)
                here()

            old(folder, then_wait if folder.name.startswith(names) else fill, **named)

        return write_folder

    replace_everywhere("lora_dpo.run_directory", "write_folder", around)
    replace_everywhere("lora_dpo.run_directory", "grow_folder", around)


def _before(owner: Any, name: str, here: Callable[[], None]) -> None:
    old = getattr(owner, name)

    def method(*given: Any, **named: Any) -> Any:
        here()
        return old(*given, **named)

    setattr(owner, name, method)


def _after(here: Callable[[], None]) -> Callable[[Callable], Callable]:
    def around(old: Callable) -> Callable:
        def function(*given: Any, **named: Any) -> Any:
            result = old(*given, **named)
            here()
            return result

        return function

    return around


PLACES: dict[str, Callable[[Callable[[], None]], None]] = dict(
    zip(
        PHASES,
        (_load, _tokenise, _reference, _forward, _backward, _optimizer_step, _evaluation, _save, _export),
        strict=True,
    )
)
