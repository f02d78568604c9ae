"""What the base's own files say of its licence: its README beside the weights, or in the hub's cache.

Nothing is looked up on the network, and nothing is concluded from a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_dpo.recipe import Base
from lora_dpo.recipe.yaml_text import parse_yaml

FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING", "NOTICE", "USE_POLICY.md")
LARGEST = 2**20
"""Bytes of a README that are read."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_ADDRESS = re.compile(r"https?://[A-Za-z0-9._~:/?#@!$&*+,;=%-]{1,500}")


@dataclass(frozen=True)
class Licence:
    """The base's licence as its README gives it: identifier, and for "other" ones a name and an address.

    files: the names of licence files that lie beside it.
    """

    identifier: str | None = None
    name: str | None = None
    link: str | None = None
    files: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str]:
        """The keys of a model card's front matter."""
        keys = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in keys.items() if value is not None}


def licence_of(base: Base, hub_id: str | None, commit: str | None = None) -> Licence:
    """The licence that the base's own files name; all None where they name none."""
    folder = (
        Path(base.model).expanduser() if hub_id is None else _cached_folder(hub_id, commit, base.revision)
    )
    if folder is None or not folder.is_dir():
        return Licence()
    values = front_matter(folder / "README.md")
    identifier = _matching(values.get("license"), _NAME)
    name = _matching(values.get("license_name"), _NAME) if identifier else None
    link = _link(values.get("license_link"), hub_id) if identifier else None
    return Licence(identifier, name, link, tuple(name for name in FILES if (folder / name).is_file()))


def _cached_folder(hub_id: str, commit: str | None, revision: str | None) -> Path | None:
    """The snapshot that the base was loaded from, where the hub's cache still has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json", revision=commit or revision)
    return Path(found).parent if isinstance(found, str) else None


def front_matter(file: Path) -> dict[object, object]:
    """The YAML values at the top of a README; none where there are none, or they are no YAML."""
    try:
        with file.open(encoding="utf-8") as text:
            content = text.read(LARGEST)
        match = re.match(r"\A---[ \t]*\n(.*?)\n---[ \t]*(\n|\Z)", content, re.DOTALL)
        values = parse_yaml(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _matching(value: object, pattern: re.Pattern[str]) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _link(value: object, hub_id: str | None) -> str | None:
    """An address as it is; the name of a file in the base's repository as its address there."""
    address = _matching(value, _ADDRESS)
    file = _matching(value, _NAME)
    if address is None and file is not None and hub_id is not None:
        return f"https://huggingface.co/{hub_id}/blob/main/{file}"
    return address
