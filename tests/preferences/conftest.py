"""Rows in a file, for tests that are not about files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any]], str]:
    """Writes rows to a JSON lines file and returns its path; equal rows share a file."""
    folder = tmp_path_factory.mktemp("rows")

    def write(rows: list[Any]) -> str:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        file.write_text(text)
        return str(file)

    return write
