"""Fixtures that several test folders share."""

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports verl, which fixes its platform then. Processes that the tests start decide for themselves.
os.environ["VERL_PLATFORM"] = "cpu"

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def countdown_dir() -> Path:
    return ROOT / "examples" / "countdown"


def compose_config(*overrides: str) -> DictConfig:
    """verl's config with our groups, as `python -m verl.trainer.main_ppo` composes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    return compose_config


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """The environment of a user's shell, without what this test session set."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("VERL_", "VLLM_", "HF_"))}
