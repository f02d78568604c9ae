"""Where the assistant's turns of a response stand in a rendering.

A turn begins where the policy would begin to write: after the generation prompt, if the conversation
contains it, so that a `<think>` the policy has to write itself is scored; otherwise where the template's
header ends. It ends with its end-of-turn, the first control token after its content that isn't a tag of
reasoning or of a tool call. After the last turn a template may write none; whatever it does write there is
scored, and an EOS is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_dpo.errors import ModelError
from lora_dpo.tokenization.control import ControlStrings
from lora_dpo.tokenization.rendering import Chat, Control, Rendering

_MEND = "data.chat_template can give another template"


@dataclass(frozen=True)
class Turn:
    """text[start:end] is scored; its last token is `end_of_turn`, None if the template writes none."""

    start: int
    end: int
    end_of_turn: Control | None


def assistant_turns(chat: Chat, rendering: Rendering, controls: ControlStrings, place: str) -> list[Turn]:
    """The scored turns of a response, in order.

    Raises ModelError, naming `place`, for a template that leaves an assistant's turn out, ends one twice,
    or ends none but the last with a token.
    """
    roles = [message["role"] for message in chat.messages]
    indices = [index for index in range(chat.response_start, len(roles)) if roles[index] == "assistant"]
    turns = [_turn(index, rendering, controls, place) for index in indices]
    for turn in turns[:-1]:
        if turn.end_of_turn is None:
            raise ModelError(
                f"{place}: the chat template ends a turn of the assistant with no token of its own; {_MEND}"
            )
    return turns


def _turn(index: int, rendering: Rendering, controls: ControlStrings, place: str) -> Turn:
    content = rendering.place_of(index)
    if rendering.leaves_out(index):
        raise ModelError(f"{place}: the chat template leaves out a turn of the response; {_MEND}")
    start = _start(index, rendering, content, place)
    after = content[1] if content else start
    following = rendering.place_of(index + 1) if index + 1 < rendering.count else None
    limit = following[0] if following else len(rendering.whole.text)
    ends = [
        control
        for control in rendering.whole.controls
        if after <= control.start < limit and controls.ends_turns(control.string)
    ]
    if not ends:
        return Turn(start, limit, None)
    if len(ends) > 1 and ends[1] == Control(ends[0].end, ends[0].string):
        raise ModelError(
            f"{place}: the chat template ends the assistant's turn with {ends[0].string} twice; {_MEND}"
        )
    return Turn(start, ends[0].end, ends[0])


def _start(index: int, rendering: Rendering, content: tuple[int, int] | None, place: str) -> int:
    text, limit = rendering.whole.text, content[0] if content else len(rendering.whole.text)
    prompt = rendering.prefix(index, generation=True)
    if prompt is not None and text.startswith(prompt) and len(prompt) <= limit:
        # A template that ignores the generation prompt writes its header with the turn.
        no_header = not text[len(prompt) : limit].strip()
        if no_header or prompt != rendering.prefix(index, generation=False):
            return len(prompt)
    header = rendering.header(index)
    if header is not None and len(header) <= limit and text.startswith(header):
        return len(header)
    if content is None:
        raise ModelError(f"{place}: the chat template shows no place for a turn of the assistant; {_MEND}")
    return content[0]
