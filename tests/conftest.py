"""Fixtures that several test folders share."""

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports verl, which fixes its platform then. Processes that the tests start decide for themselves.
os.environ["VERL_PLATFORM"] = "cpu"

import hypothesis
import pytest
from compose import compose_config
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent

# A machine that is busy with something else must not fail a test.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("shared machine")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real runs first: they take the longest, and with several workers what is short fills the gap at the end."""
    real = ("real_run", "real_more")
    items.sort(key=lambda item: not any(item.get_closest_marker(marker) for marker in real))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With -v: what `make gpu-check` has checked, and with what."""
    for report in terminalreporter.getreports("passed") if terminalreporter.verbosity > 0 else ():
        for name, value in report.user_properties:
            if name == "gpu_check":
                terminalreporter.write_line(f"checked: {value}")


@pytest.fixture(scope="session")
def countdown_dir() -> Path:
    return ROOT / "examples" / "countdown"


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    return compose_config


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """The environment of a user's shell, without what this test session set."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("VERL_", "VLLM_", "HF_"))}
