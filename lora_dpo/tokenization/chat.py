"""Records → branches: each side rendered and tokenized whole, then what the sides share is found.

Legend: `T` tokens of a side.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_dpo.errors import DataError, ModelError
from lora_dpo.preferences import AnyRecord, Message, Preference, Rating
from lora_dpo.tokenization import truncation
from lora_dpo.tokenization.branches import Branches, Ids, Mask, share
from lora_dpo.tokenization.control import ControlStrings
from lora_dpo.tokenization.encoding import Encoded, Encoder
from lora_dpo.tokenization.rendering import Chat, Rendering, Template
from lora_dpo.tokenization.truncation import Dropped, Limits, Side
from lora_dpo.tokenization.turns import Turn, assistant_turns

_PROBE = ({"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."})

_RENDERING = ("apply_chat_template", "get_chat_template")


class ChatTokenizer:
    """A tokenizer, a chat template and the limits on length.

    tokenizer: a fast one. chat_template: Jinja text or a file's path; None takes the tokenizer's own, and
    text that is already rendered needs none. max_tokens, max_prompt_tokens: see `truncation`. Raises
    ModelError for a slow tokenizer or a template that is neither text nor a file.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        max_tokens: int = 1024,
        max_prompt_tokens: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = Limits(max_tokens, max_prompt_tokens)
        self._controls = ControlStrings(tokenizer)
        self._encoder = Encoder(tokenizer, self._controls)
        self._template = Template(tokenizer, chat_template)
        self._controls.set_structure(self._structure())

    @property
    def chat_template(self) -> str | None:
        """The template's text, as an export should carry it; None if there is none."""
        own = self._tokenizer.chat_template
        return self._template.text or (own if isinstance(own, str) else None)

    def settings(self) -> dict[str, Any] | None:
        """Everything that decides what becomes of a record, as JSON; `portable` makes a copy from it.

        None for a tokenizer whose class has its own way of applying templates.
        """
        own = type(self._tokenizer)
        if any(getattr(own, name) is not getattr(PreTrainedTokenizerBase, name) for name in _RENDERING):
            return None
        return {
            "backend": self._encoder.backend_json(),
            "lead": list(self._encoder.lead),
            "special": dict(self._tokenizer.special_tokens_map),
            "ids": [getattr(self._tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")],
            "template": self._template.text or self._tokenizer.chat_template,
            "max_tokens": self._limits.tokens,
            "max_prompt_tokens": self._limits.prompt,
        }

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant's turn: the template's end-of-turn, then the EOS. May be empty."""
        probe = self._probe()
        turns = assistant_turns(Chat(_PROBE, 1), probe, self._controls, "a test") if probe else []
        ends = [self._controls.ids[turn.end_of_turn.string] for turn in turns if turn.end_of_turn]
        return tuple(dict.fromkeys([*ends, *self._eos]))

    def branches(self, record: AnyRecord) -> Branches:
        """The sides of a record, cut to the limits, prefix shared: chosen and rejected of a preference, the
        response of a demonstration, response and mismatched one of a rating.

        Raises Dropped if truncation leaves nothing to learn or the mismatched response can't stand under
        this prompt; DataError if the template refuses the conversation, ModelError if template and tokenizer
        don't give one BOS and one end-of-turn.
        """
        try:
            sides, cut = self._fit(record)
        except (DataError, ModelError) as error:
            if not isinstance(record, Rating) or record.mismatched is None:
                raise
            self._fit(replace(record, mismatched=None))  # raises where the fault is the record's own
            raise Dropped(truncation.MISMATCHED, record.where) from error
        truncation.check(sides, record.where, cut, alike=isinstance(record, Rating))
        ids, scored = [side.ids for side in sides], [side.scored for side in sides]
        return share(ids, scored, record.where, record.values)

    def prompt_ids(
        self,
        messages: Sequence[Message] | str,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Ids:
        """int32 [T]: a prompt to generate from, uncut, with BOS and generation prompt (text: verbatim).

        Raises DataError if the template refuses it.
        """
        if isinstance(messages, str):
            return self._with_lead(self._encoder.encode_verbatim(messages).ids, "a prompt")
        chat = Chat(tuple(messages), len(messages), tuple(tools) if tools else None, template_kwargs or {})
        rendering = Rendering(self._template, self._controls, chat, "a prompt", generation=True)
        return self._with_lead(self._encoder.encode(rendering.whole).ids, "a prompt")

    def decode(self, ids: Sequence[int]) -> str:
        """A generated response as text, without its special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the tokenizer with the chat template that was used: what serving the model needs. Raises
        OSError.
        """
        own = self._tokenizer.chat_template
        try:
            self._tokenizer.chat_template = self.chat_template  # pyright: ignore[reportAttributeAccessIssue]
            self._tokenizer.save_pretrained(str(folder))
        except Exception as error:
            if type(error) is not Exception:
                raise
            # What the tokenizers library says of a full disk is of no type of its own.
            raise OSError(f"the tokenizer cannot be written: {error}") from error
        finally:
            self._tokenizer.chat_template = own

    def _fit(self, record: AnyRecord) -> tuple[list[Side], bool]:
        """A record's sides within the limits, and whether anything was cut."""
        uncut = sides = self._sides(record, record.prompt)
        room = self._limits.prompt_room(sides)
        if truncation.longest_prompt(sides) > room:
            sides = self._shorten(record, sides, room)
        sides = [truncation.cut_right(side, self._limits.tokens) for side in sides]
        return sides, any(len(a.ids) != len(b.ids) for a, b in zip(uncut, sides, strict=True))

    def _shorten(self, record: AnyRecord, sides: list[Side], room: int) -> list[Side]:
        """Sides whose prompt has at most `room` tokens: by whole messages if that does it, else by tokens."""
        if not isinstance(record.prompt, str):
            for prompts in truncation.shorter_prompts(record.prompt):
                fitting, shortest = self._first_fitting(record, prompts, room)
                if fitting:
                    return fitting
                sides = shortest or sides
        longest = truncation.longest_prompt(sides)
        return [truncation.cut_left(side, room, longest) for side in sides]

    def _first_fitting(
        self, record: AnyRecord, prompts: list[tuple[Message, ...]], room: int
    ) -> tuple[list[Side] | None, list[Side] | None]:
        """The sides of the longest of `prompts` that fits, and those of the shortest that was tried."""
        tried: dict[int, list[Side]] = {}

        def fits(place: int) -> bool:
            try:
                tried[place] = self._sides(record, prompts[place])
            except DataError:  # the template wants what was left out
                return False
            return truncation.longest_prompt(tried[place]) <= room

        first = bisect_left(range(len(prompts)), True, key=fits)
        return tried.get(first), tried[max(tried)] if tried else None

    def _sides(self, record: AnyRecord, prompt: tuple[Message, ...] | str) -> list[Side]:
        place = str(record.where)
        if isinstance(prompt, str):
            return [self._text_side(prompt, str(response), place) for response in _responses(record)]
        return [self._chat_side(chat, place) for chat in self._chats(record, prompt)]

    def _chats(self, record: AnyRecord, prompt: tuple[Message, ...]) -> list[Chat]:
        responses = cast("list[tuple[Message, ...]]", _responses(record))
        return [Chat(prompt + r, len(prompt), record.tools, record.template_kwargs) for r in responses]

    def _chat_side(self, chat: Chat, place: str) -> Side:
        """A whole conversation: tokens that start inside the response's assistant turns are scored."""
        rendering = Rendering(self._template, self._controls, chat, place)
        turns = assistant_turns(chat, rendering, self._controls, place)
        encoded = self._encoder.encode(rendering.whole)
        scored = _scored(encoded, rendering.whole.text, [(turn.start, turn.end) for turn in turns])
        self._check_ends(encoded, scored, turns, place)
        ended = bool(turns) and turns[-1].end_of_turn is not None
        return self._side(encoded.ids, scored, add_eos=not ended, place=place)

    def _text_side(self, prompt: str, response: str, place: str) -> Side:
        """Text that is already rendered: tokens that start inside the response are scored, then an EOS."""
        encoded = self._encoder.encode_verbatim(prompt + response)
        scored = _scored(encoded, prompt + response, [(len(prompt), len(prompt) + len(response))])
        ended = any(response.rstrip().endswith(end) for end in self._text_ends)
        return self._side(encoded.ids, scored, add_eos=not ended, place=place)

    def _side(self, ids: Ids, scored: Mask, add_eos: bool, place: str) -> Side:
        if add_eos:
            if not self._eos:
                raise ModelError(
                    f"{place}: a response has no end-of-turn, and the tokenizer has no EOS to add"
                )
            ids, scored = np.append(ids, np.int32(self._eos[0])), np.append(scored, True)
        whole = self._with_lead(ids, place)
        scored = np.concatenate([np.zeros(len(whole) - len(scored), dtype=np.bool_), scored])
        lead = len(self._encoder.lead) or int(len(whole) > 0 and whole[0] == self._tokenizer.bos_token_id)
        return Side(whole, scored, lead)

    def _with_lead(self, ids: Ids, place: str) -> Ids:
        """Put the tokenizer's BOS in front if the text doesn't begin with it. Raises ModelError for two."""
        lead = np.array(self._encoder.lead, dtype=np.int32)
        if len(lead) and not np.array_equal(ids[: len(lead)], lead):
            ids = np.concatenate([lead, ids])
        bos = self._tokenizer.bos_token_id
        if len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            raise ModelError(
                f"{place}: the text begins with two BOS tokens ({self._tokenizer.bos_token}): the chat"
                " template writes it twice; data.chat_template can give one that writes it once"
            )
        return ids

    def _check_ends(self, encoded: Encoded, scored: Mask, turns: list[Turn], place: str) -> None:
        """Raises ModelError unless every turn's last scored token is the end-of-turn found in the text."""
        for turn in turns:
            if turn.end_of_turn is None:
                continue
            inside = np.flatnonzero(scored & (encoded.starts < turn.end))
            expected = self._controls.ids[turn.end_of_turn.string]
            if not len(inside) or encoded.ids[inside[-1]] != expected:
                raise ModelError(
                    f"{place}: the assistant's turn should end with {turn.end_of_turn.string}, but the"
                    " tokenizer doesn't make one token of it; data.chat_template can give another template"
                )

    @cached_property
    def _eos(self) -> tuple[int, ...]:
        eos = self._tokenizer.eos_token_id
        return (eos,) if isinstance(eos, int) else ()

    @cached_property
    def _text_ends(self) -> tuple[str, ...]:
        """Strings that end a response which is already rendered: EOS, or any special token."""
        return tuple(text for text in self._controls.special if self._controls.ends_turns(text))

    def _structure(self) -> set[str]:
        """Control strings that the template's source names, or that it writes in a small conversation."""
        probe, source = self._probe(), self._template.source
        written = {control.string for control in probe.whole.controls} if probe else set()
        return written.union(self._controls.pattern.findall(source))

    def _probe(self) -> Rendering | None:
        """A small conversation in this template; None if there is no template, or it refuses that."""
        if not self._template.exists:
            return None
        try:
            return Rendering(self._template, self._controls, Chat(_PROBE, 1), "a test conversation")
        except DataError:
            return None


def _scored(encoded: Encoded, text: str, spans: Sequence[tuple[int, int]]) -> Mask:
    """bool [T]: tokens whose characters start inside one of `spans`.

    Spaces before a span belong to the word that takes them along: " yes" after "Answer: " is scored.
    """
    starts, ends = encoded.starts, encoded.ends
    scored = np.zeros(len(encoded.ids), dtype=np.bool_)
    for start, end in spans:
        spaces = len(text[:start].rstrip(" "))
        scored |= (starts < end) & ((starts >= start) | ((starts >= spaces) & (ends > start)))
    return scored


def _responses(record: AnyRecord) -> list[tuple[Message, ...] | str]:
    if isinstance(record, Preference):
        return [record.chosen, record.rejected]
    if isinstance(record, Rating) and record.mismatched is not None:
        return [record.response, record.mismatched]
    return [record.response]
