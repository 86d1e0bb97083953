"""Fixtures that several test folders share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def countdown_dir() -> Path:
    return ROOT / "examples" / "countdown"
