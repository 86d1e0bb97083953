"""Everything that can't be honoured is refused in one sentence: key, value, fix. And nothing else is."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from safetensors.torch import save_file

from recipe.soup.prefixes import PrefixBank
from recipe.soup.refusals import BANK_FILE, check_config
from recipe.soup.settings import parse_settings

Compose = Callable[..., DictConfig]
BASE = ("algorithm=soup", "hardware=cpu", "example=countdown")
ROLLOUT = "actor_rollout_ref.rollout"


def sentence(config: DictConfig) -> str:
    with pytest.raises(SystemExit) as refusal:
        check_config(config)
    text = str(refusal.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_the_example_is_accepted(composed: Compose) -> None:
    check_config(composed(*BASE))


def test_soup_without_example_and_hardware_is_accepted(composed: Compose, countdown_dir: Path) -> None:
    data = [f"data.{kind}_files={countdown_dir}/data/{kind}.parquet" for kind in ("train", "val")]
    model = f"actor_rollout_ref.model.path={countdown_dir}/base_model"
    check_config(composed("algorithm=soup", f"{ROLLOUT}.name=vllm", model, *data))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.soup.mixed_share=1.5", ["algorithm.soup.mixed_share=1.5", "between 0 and 1"]),
        ("algorithm.soup.mixed_share=-0.1", ["algorithm.soup.mixed_share=-0.1"]),
        ("algorithm.soup.lag=-1", ["algorithm.soup.lag=-1", "0 or more"]),
        ("algorithm.soup.lag=many", ["algorithm.soup.lag=many"]),
        ("algorithm.soup.prefix_length.max=24", ["algorithm.soup.prefix_length.max=24", "23"]),
        ("algorithm.soup.prefix_length.min=0", ["algorithm.soup.prefix_length.min=0"]),
        ("algorithm.soup.prefix_length.min=9", ["algorithm.soup.prefix_length.min=9", "8"]),
        ("algorithm.soup.prefix_length.distribution=beta", ["prefix_length.distribution=beta", "uniform"]),
        ("algorithm.soup.warm_start=cold", ["algorithm.soup.warm_start=cold", "pure, fill, ramp"]),
        ("algorithm.soup.on_eos=drop", ["algorithm.soup.on_eos=drop", "keep, cut"]),
        ("algorithm.soup.source=memory", ["algorithm.soup.source=memory", "lookahead, snapshot, replay"]),
        ("algorithm.soup.snapshot.every=0", ["algorithm.soup.snapshot.every=0"]),
        ("algorithm.soup.snapshot.keep=1", ["algorithm.soup.snapshot.keep=1", "lag=8", "every=4", "3"]),
        ("algorithm.soup.snapshot.eviction=lru", ["snapshot.eviction=lru", "log_spaced"]),
        ("algorithm.soup.snapshot.storage=tape", ["snapshot.storage=tape", "memory, disk"]),
        ("algorithm.soup.snapshot.placement=cloud", ["snapshot.placement=cloud", "standalone"]),
        ("algorithm.soup.ratio=shaped", ["algorithm.soup.ratio=shaped", "behavior"]),
        ("+algorithm.soup.lagg=3", ["algorithm.soup.lagg=3"]),
        ("+algorithm.soup.prefix_length.mean=3", ["algorithm.soup.prefix_length.mean=3"]),
        (f"{ROLLOUT}.top_p=0.9", [f"{ROLLOUT}.top_p=0.9", "1.0"]),
        (f"{ROLLOUT}.top_k=50", [f"{ROLLOUT}.top_k=50", "-1"]),
        (f"+{ROLLOUT}.min_p=0.1", [f"{ROLLOUT}.min_p=0.1"]),
        (f"+{ROLLOUT}.repetition_penalty=1.1", [f"{ROLLOUT}.repetition_penalty=1.1"]),
        (f"{ROLLOUT}.temperature=0", [f"{ROLLOUT}.temperature=0"]),
        (f"{ROLLOUT}.logprobs_mode=raw_logprobs", [f"{ROLLOUT}.logprobs_mode=raw_logprobs", "processed_logprobs"]),
        (f"{ROLLOUT}.calculate_log_probs=false", [f"{ROLLOUT}.calculate_log_probs=False", "True"]),
        ("trainer.v1.trainer_mode=colocate_async", ["trainer.v1.trainer_mode=colocate_async", "soup"]),
        ("trainer.use_v1=false", ["trainer.use_v1=False"]),
        (f"{ROLLOUT}.name=sglang", [f"{ROLLOUT}.name=sglang", "vllm"]),
        (f"{ROLLOUT}.agent.default_agent_loop=tool_agent", ["default_agent_loop=tool_agent", "soup_agent"]),
        (f"{ROLLOUT}.multi_turn.enable=true", [f"{ROLLOUT}.multi_turn.enable=True"]),
        ("actor_rollout_ref.model.path=/no/such/model", ["actor_rollout_ref.model.path=/no/such/model"]),
        ("data.train_files=/no/such.parquet", ["data.train_files=/no/such.parquet"]),
        ("data.val_files=[/no/such.parquet]", ["data.val_files=/no/such.parquet"]),
        (
            f"+{ROLLOUT}.engine_kwargs.vllm.logprobs_mode=raw_logprobs",
            ["engine_kwargs.vllm.logprobs_mode=raw_logprobs"],
        ),
        (f"{ROLLOUT}.enable_rollout_routing_replay=true", ["enable_rollout_routing_replay=True"]),
        (f"{ROLLOUT}.response_length=8", ["algorithm.soup.prefix_length.max=8", "7"]),
        ("distillation.enabled=true", ["distillation.enabled=True"]),
        ("algorithm.use_kl_in_reward=true", ["algorithm.use_kl_in_reward=True"]),
        ("data.image_key=prompt", ["data.image_key=prompt", "multimodal"]),
    ],
)
def test_refused(composed: Compose, override: str, words: list[str]) -> None:
    text = sentence(composed(*BASE, override))
    for word in words:
        assert word in text


def test_a_hub_name_without_network_is_refused(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in sentence(composed(*BASE, "actor_rollout_ref.model.path=nobody/nothing"))


@pytest.mark.parametrize("column", ["agent_name", "__do_sample__", "__rollout_n__"])
@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_a_dataset_that_would_bypass_us_is_refused(composed: Compose, tmp_path: Path, column: str, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    frame = pd.DataFrame({"prompt": ["x"], column: [1]})
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    assert column in sentence(composed(*BASE, f"data.train_files={path}"))


def test_files_of_a_dataset_class_of_ones_own_are_its_own_affair(composed: Compose) -> None:
    check_config(composed(*BASE, "data.custom_cls.path=x.py", "data.train_files=some/hub_name"))


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_resuming_without_a_bank_is_refused_and_with_one_is_not(composed: Compose, tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "global_step_4"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    overrides = [f"trainer.resume_mode={mode}", f"trainer.default_local_dir={tmp_path}"]
    config = composed(*BASE, *overrides, f"trainer.resume_from_path={folder}")
    assert BANK_FILE in sentence(config)
    PrefixBank().save(folder / BANK_FILE, "replay", 0, {})
    assert "source=replay" in sentence(config)  # another source's prefixes
    PrefixBank().save(folder / BANK_FILE, "lookahead", 0, {})
    check_config(config)
    (folder / BANK_FILE).unlink()
    config.algorithm.soup.mixed_share = 0.0  # nothing is lost
    check_config(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["snapshot.policy=newest"], ["algorithm.soup.snapshot.policy=newest", "lagged, pool, base, best"]),
        (["snapshot.policy=/nowhere"], ["algorithm.soup.snapshot.policy=/nowhere", "no such folder"]),
        (["snapshot.n_gpus=2"], ["algorithm.soup.snapshot.n_gpus=2", "null"]),
        (["snapshot.n_gpus=0", "snapshot.placement=standalone"], ["snapshot.n_gpus=0", "multiple"]),
    ],
)
def test_snapshots_that_cannot_be_are_refused(composed: Compose, overrides: list[str], words: list[str]) -> None:
    soup = [f"algorithm.soup.{override}" for override in ["source=snapshot", *overrides]]
    text = sentence(composed(*BASE, *soup))
    assert all(word in text for word in words), text
    check_config(composed(*BASE, *soup, "algorithm.soup.source=replay"))


def test_adapters_that_are_not_merged_have_no_snapshot(composed: Compose) -> None:
    overrides = ["algorithm.soup.source=snapshot", "actor_rollout_ref.model.lora_rank=8"]
    assert "actor_rollout_ref.model.lora.merge=False" in sentence(composed(*BASE, *overrides))
    check_config(composed(*BASE, *overrides, "actor_rollout_ref.model.lora.merge=True"))


def test_whole_responses_end_with_their_end(composed: Compose) -> None:
    whole = [*BASE, "algorithm.soup.source=replay", "algorithm.soup.prefix_length.distribution=whole"]
    check_config(composed(*whole))
    assert "algorithm.soup.on_eos=cut" in sentence(composed(*whole, "algorithm.soup.on_eos=cut"))


def test_weights_without_safetensors_are_refused(composed: Compose, tmp_path: Path) -> None:
    overrides = ["algorithm.soup.source=snapshot", f"algorithm.soup.snapshot.policy={tmp_path}"]
    assert "model_merger" in sentence(composed(*BASE, *overrides))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    check_config(composed(*BASE, *overrides))


def test_as_many_snapshots_are_kept_as_the_lag_needs(composed: Compose) -> None:
    config = composed(*BASE, "algorithm.soup.source=snapshot", "algorithm.soup.lag=9")
    assert parse_settings(config.algorithm.soup, 24).snapshot.keep == 3  # 8 updates behind the newest, every 4


def test_prefix_bounds_do_not_matter_without_mixing(composed: Compose) -> None:
    check_config(composed(*BASE, "algorithm.soup.mixed_share=0", "data.max_response_length=1"))


@pytest.mark.parametrize(("group", "refuses"), [("soup", True), ("grpo", False), (None, False)])
def test_only_soup_refuses(group: str | None, refuses: bool) -> None:
    overrides = [f"algorithm={group}"] if group else []
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides, return_hydra_config=True)
    assert ("soup" in config.hydra.callbacks) == refuses


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*BASE, "algorithm.soup.lag=-3"], "algorithm.soup.lag=-3"),
        (["algorithm=grpo", "hardware='cpu'"], "hardware=cpu"),
    ],
)
def test_the_command_ends_with_one_sentence_before_ray_starts(
    overrides: list[str], words: str, tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    result = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1]
    assert not re.search("Traceback|ray init", result.stderr + result.stdout)
