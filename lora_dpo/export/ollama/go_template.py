"""Turns in the template language of Ollama, Go's text/template, over `.Messages` and `.System`.

Ollama joins messages of one role that follow each other, and all system messages in `.System`. White space
counts, so that nothing is broken into lines for the eye.
"""

from __future__ import annotations

from lora_dpo.export.ollama.chat_turns import Turns


def go_template(turns: Turns) -> str:
    """A TEMPLATE that writes the turns, and the generation prompt after all but an assistant's last one.

    An assistant's last message stays open: it is what the model goes on with.
    """
    parts = [literal(turns.begin)]
    if turns.inside == "first":
        parts.append("{{ $inside := false }}")
    if turns.default:
        parts += ["{{ if not .System }}", literal(turns.default), "{{ end }}"]
    parts.append(
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}'
    )
    parts += [_user(turns), '{{ else if eq .Role "assistant" }}', _opening(turns.assistant.before, turns.bos)]
    parts += ["{{ .Content }}{{ if not $last }}", literal(turns.assistant.after), "{{ end }}"]
    parts += [_system(turns), "{{ end }}"]
    if turns.generation:
        parts += ['{{ if and $last (ne .Role "assistant") }}', literal(turns.generation), "{{ end }}"]
    return "".join(parts) + "{{ end }}"


def _user(turns: Turns) -> str:
    before, after = _opening(turns.user.before, turns.bos), literal(turns.user.after)
    if turns.system is None or turns.inside == "no":
        return f"{before}{{{{ .Content }}}}{after}"
    if turns.inside == "first":
        held = f"{{{{ if not $inside }}}}{before}{{{{ end }}}}{{{{ .Content }}}}{after}"
        return f"{held}{{{{ $inside = false }}}}"
    system = f"{literal(turns.system.before)}{{{{ $.System }}}}{literal(turns.system.after)}"
    return f"{before}{{{{ if and $last $.System }}}}{system}{{{{ end }}}}{{{{ .Content }}}}{after}"


def _system(turns: Turns) -> str:
    if turns.system is None or turns.inside == "last":
        return ""
    branch, after = '{{ else if eq .Role "system" }}', literal(turns.system.after)
    if turns.inside == "no":
        return f"{branch}{_opening(turns.system.before, turns.bos)}{{{{ .Content }}}}{after}"
    before = _opening(turns.user.before, turns.bos) + literal(turns.system.before)
    return f"{branch}{before}{{{{ .Content }}}}{after}{{{{ $inside = true }}}}"


def _opening(text: str, bos: str) -> str:
    """The beginning of a turn, without the BOS in the very first one, where the runtime adds it."""
    if not bos or not text.startswith(bos):
        return literal(text)
    return f"{{{{ if $i }}}}{literal(bos)}{{{{ end }}}}{literal(text.removeprefix(bos))}"


def literal(text: str) -> str:
    """Text as it stands, or as a Go string where it would mean something, or where Ollama would lose it.

    Ollama reads a TEMPLATE up to three quotes, and drops characters that aren't printable.
    """
    harmless = all(letter == "\n" or letter.isprintable() for letter in text)
    if harmless and "{{" not in text and '"""' not in text and not text.endswith(("{", '"')):
        return text
    return '{{ "' + "".join(map(_escaped, text)) + '" }}'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter == "\n":
        return "\\n"
    if letter.isprintable() and letter not in "{}":
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"
