"""The tokenizer designs as fixtures; they are made once a session."""

from __future__ import annotations

import pytest
from tokenizer_designs import BUILDERS, Design


@pytest.fixture(scope="session")
def designs() -> dict[str, Design]:
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(scope="session", params=list(BUILDERS))
def design(request: pytest.FixtureRequest, designs: dict[str, Design]) -> Design:
    return designs[request.param]
