"""Text → token ids with the character each token starts at, in two ways.

The ordinary way is the tokenizer's own. The other is a copy of it whose control strings bear nonces: in
text where the template's control strings have been exchanged for their nonces, content that looks like one
stays text.

Legend: `T` tokens.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lora_dpo.errors import ModelError
from lora_dpo.tokenization.branches import Ids
from lora_dpo.tokenization.control import ControlStrings
from lora_dpo.tokenization.rendering import Control, Reading


@dataclass(frozen=True)
class Encoded:
    """ids: int32 [T]. starts, ends: int64 [T], characters of the text."""

    ids: Ids
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class Encoder:
    """Encodes readings. lead: ids the tokenizer itself puts before a text, most often one BOS.

    Raises ModelError for a tokenizer without a fast backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: ControlStrings) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not tokenizer.is_fast or backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} gives no character offsets; the base model needs a fast"
                " tokenizer (a tokenizer.json)"
            )
        self._backend: Tokenizer = backend
        self._ordinary = _bare(Tokenizer.from_str(backend.to_str()))
        self._controls = controls
        size = 1 + max(*tokenizer.get_vocab().values(), *controls.ids.values(), 0)
        self._is_control = np.zeros(size, dtype=np.bool_)
        self._is_control[list(controls.ids.values())] = True
        unknown = tokenizer.unk_token_id
        if isinstance(unknown, int):
            self._is_control[unknown] = (
                False  # characters outside the vocabulary give it, and it forges nothing
            )
        self.lead = _lead(tokenizer)

    def backend_json(self) -> str:
        """The tokenizer's backend as it would stand in a tokenizer.json."""
        return self._backend.to_str()

    def encode(self, reading: Reading) -> Encoded:
        """Tokens of a rendering: the tokenizer's own where content made none of its control tokens."""
        if reading.clean:
            encoded = _encode(self._ordinary, reading.text)
            if self._only_from(reading.controls, encoded):
                return encoded
        return self._encode_apart(reading.text, reading.controls)

    def encode_verbatim(self, text: str) -> Encoded:
        """Tokens of text that is already rendered: its control strings are control tokens."""
        return _encode(self._ordinary, text)

    def _only_from(self, controls: Sequence[Control], encoded: Encoded) -> bool:
        """Whether every control token covers one of `controls` (a normalizer may make others)."""
        places = np.array([control.start for control in controls], dtype=np.int64)
        found = self._is_control[encoded.ids]
        before, until = (np.searchsorted(places, x[found]) for x in (encoded.starts, encoded.ends))
        return bool((until > before).all())

    def _encode_apart(self, text: str, controls: Sequence[Control]) -> Encoded:
        encoded = self._with_nonces(text, controls)
        matched = [control for control in controls if self._has_token(encoded, control)]
        if len(matched) < len(
            controls
        ):  # the tokenizer itself reads these as text, for what stands beside them
            encoded = self._with_nonces(text, matched)
        expected = sum(bool(self._is_control[self._controls.ids[control.string]]) for control in matched)
        if int(self._is_control[encoded.ids].sum()) != expected:
            raise ModelError(
                "this tokenizer makes control tokens out of plain text; its data can't be used safely"
            )
        return encoded

    def _has_token(self, encoded: Encoded, control: Control) -> bool:
        first = int(np.searchsorted(encoded.ends, control.start, side="right"))
        return first < len(encoded.ids) and int(encoded.ids[first]) == self._controls.ids[control.string]

    def _with_nonces(self, text: str, controls: Sequence[Control]) -> Encoded:
        """Encode `text` with `controls` exchanged for their nonces; places are given in `text`."""
        pieces, done = [], 0
        for control in controls:
            pieces += [text[done : control.start], self._nonces[control.string]]
            done = control.end
        encoded = _encode(self._renamed, "".join([*pieces, text[done:]]))
        longer = [len(self._nonces[control.string]) - len(control.string) for control in controls]
        shift = np.cumsum([0, *longer], dtype=np.int64)
        nonce_ends = np.array([control.end for control in controls], dtype=np.int64) + shift[1:]
        starts = encoded.starts - shift[np.searchsorted(nonce_ends, encoded.starts, side="right")]
        ends = encoded.ends - shift[np.searchsorted(nonce_ends, encoded.ends, side="right")]
        ends = np.minimum.accumulate(ends[::-1])[::-1]  # pieces of a nonce the copy did not match end nowhere
        return Encoded(self._own_ids[encoded.ids], starts, ends)

    @cached_property
    def _nonces(self) -> dict[str, str]:
        """Control string → a string no content holds. Private-use characters survive normalizers."""
        secret = secrets.token_hex(16)
        return {text: f"\U00100000{secret}{n:x}\U00100001" for n, text in enumerate(self._controls.ids)}

    @cached_property
    def _renamed(self) -> Tokenizer:
        state = _rename(json.loads(self._backend.to_str()), self._nonces)
        return _bare(Tokenizer.from_str(json.dumps(state)))

    @cached_property
    def _own_ids(self) -> Ids:
        """int32 [V]: the copy's ids → the tokenizer's."""
        names = self._renamed.get_vocab(with_added_tokens=True)
        own = np.arange(1 + max(names.values()), dtype=np.int32)
        for text, nonce in self._nonces.items():
            own[names[nonce]] = self._controls.ids[text]
        return own


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """Without truncation, padding, and the post-processor (it may trim offsets, and makes no ids here)."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    cast("Any", tokenizer).post_processor = None
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str) -> Encoded:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids, pairs = encoding.ids, encoding.offsets
    # Flat: numpy takes twice as long to find out that a list of tuples is a table.
    offsets = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(ids)).reshape(-1, 2)
    return Encoded(np.array(ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])


def _lead(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids a tokenizer puts before any text of its own accord."""
    alone: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    full: list[int] = tokenizer("a")["input_ids"]  # pyright: ignore[reportAssignmentType]
    starts = (n for n in range(len(full)) if full[n : n + len(alone)] == alone)
    return tuple(full[: next(starts, 0)])


def _rename(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer's JSON with `names` for its added tokens and pieces, without merges that spell one."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    state["post_processor"] = None
    return state
