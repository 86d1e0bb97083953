"""The model of random weights: verl can prompt it, and its samples get rewards that differ."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer

from benchmarks import random_model as script


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    arguments = ["--layers", "1", "--hidden", "64", "--heads", "2", "--vocabulary", "300"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["random_model", str(folder), *arguments])
        script.main()
    return folder


def test_every_token_has_a_name(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == AutoConfig.from_pretrained(model).vocab_size == 300
    assert len(tokenizer("\n")["input_ids"]) == 1
    assert tokenizer.decode(tokenizer("3 5 7=22:")["input_ids"]) == "3 5 7=22:"


def test_verls_agent_loop_builds_its_prompts(model: Path, countdown_dir: Path) -> None:
    """With verl's own choice of a builder for the architecture; without its special tokens every sample fails."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from recipe.soup.verl_adapter.agent_loop import SoupAgentLoop

    rollout = {"prompt_length": 64, "response_length": 8}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
    tokenizer = AutoTokenizer.from_pretrained(model)
    row = pd.read_parquet(countdown_dir / "data" / "train.parquet").iloc[0]

    async def prompt_ids() -> list[int]:
        loop = cast(Any, SoupAgentLoop)(
            trainer_config=SimpleNamespace(config=config),
            server_manager=None,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=RLHFDataset,
            data_config=SimpleNamespace(config=config.data),
            hf_model_type=AutoConfig.from_pretrained(model).model_type,
        )
        return await loop.ct_build_initial_tokens(list(row.prompt))

    assert tokenizer.decode(asyncio.run(prompt_ids())) == row.prompt[0]["content"]


def test_the_reward_differs_within_a_group(composed: Any) -> None:
    from verl.trainer.ppo.reward import get_custom_reward_fn

    path = "reward.custom_reward_function.path=pkg://benchmarks.hash_reward"
    reward = get_custom_reward_fn(composed("algorithm=soup", path))
    assert reward is not None
    texts = [f"<{i}>" for i in range(8)]
    rewards = [reward(data_source="", solution_str=text, ground_truth=None) for text in [*texts, texts[0]]]
    assert len(set(rewards)) == len(texts)
    assert rewards[-1] == rewards[0]
    assert all(0 <= value < 1 for value in rewards)
