"""The historical engine's share of a GPU, and the sums that are refused. The GPU is a number here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from refusals import changing
from safetensors.torch import save_file

from recipe.soup.checks import snapshot_memory
from recipe.soup.checks.config import check_config
from recipe.soup.checks.snapshot_memory import engine_overrides, gpu_bytes, parameters, trainer_bytes
from recipe.soup.settings import parse_settings

Compose = Callable[..., DictConfig]
SNAPSHOT, ROLLOUT = "algorithm.soup.snapshot", "actor_rollout_ref.rollout"
FSDP = "actor_rollout_ref.actor.fsdp_config"
KEY = f"{SNAPSHOT}.gpu_memory_utilization"
STANDALONE = f"{SNAPSHOT}.placement=standalone"
GPU, PARAMS = 80e9, 4e9
"""A GPU of 80 GB, and 4 G parameters: 8 GB of weights in an engine, 48 GB of weights and Adam in one trainer."""


@pytest.fixture(scope="module")
def base(composed: Compose, countdown_dir: Path) -> DictConfig:
    data = [f"data.{kind}_files={countdown_dir}/data/{kind}.parquet" for kind in ("train", "val")]
    model = f"actor_rollout_ref.model.path={countdown_dir}/base_model"
    return composed(
        "algorithm=soup", "algorithm.soup.source=snapshot", f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.n=8", model, *data,
        f"{ROLLOUT}.tensor_model_parallel_size=1", "trainer.n_gpus_per_node=4",
    )  # fmt: skip


@pytest.fixture
def example(base: DictConfig, monkeypatch: pytest.MonkeyPatch) -> Compose:
    monkeypatch.setattr(snapshot_memory, "gpu_bytes", lambda: GPU)
    monkeypatch.setattr(snapshot_memory, "parameters", lambda path: PARAMS)
    return changing(base)


def overrides_of(config: DictConfig) -> dict:
    return engine_overrides(config, parse_settings(config.algorithm.soup, 512).snapshot)


def refusal(config: DictConfig) -> str:
    with pytest.raises(SystemExit) as refused:
        check_config(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "share", "sequences"),
    [
        ([], 0.72, 256),  # a tenth less than the rollout's, for what that one keeps asleep
        ([STANDALONE], 0.8, 256),
        ([f"{KEY}=0.3", f"{SNAPSHOT}.max_num_seqs=64"], 0.3, 64),
        ([f"{KEY}=0.3", STANDALONE], 0.3, 256),
    ],
)
def test_what_the_historical_engine_gets(example: Compose, overrides: list[str], share: float, sequences: int) -> None:
    config = example(f"{ROLLOUT}.gpu_memory_utilization=0.8", f"{ROLLOUT}.max_num_seqs=256", *overrides)
    expected = {"gpu_memory_utilization": pytest.approx(share), "max_num_seqs": sequences}
    assert overrides_of(config) == expected


@pytest.mark.parametrize("override", [f"{KEY}=0", f"{KEY}=1.1", f"{KEY}=-0.5", f"{SNAPSHOT}.max_num_seqs=0"])
def test_outside_its_bounds(example: Compose, override: str) -> None:
    assert refusal(example(override)).startswith(f"{override.split('=')[0]}=")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{KEY}=0.8"],  # 64 + 12 + 2 = 78 GB
        [f"{ROLLOUT}.gpu_memory_utilization=0.8"],
        [f"{KEY}=0.99", STANDALONE],
        [f"{KEY}=0.95", f"{FSDP}.param_offload=true", f"{FSDP}.optimizer_offload=true"],
        [f"{KEY}=0.95", f"{FSDP}.offload_policy=true", "actor_rollout_ref.actor.strategy=fsdp2"],
        [f"{ROLLOUT}.free_cache_engine=false", f"{KEY}=0.3"],
        [f"{KEY}=0.95", "trainer.device=cpu"],
        [f"{ROLLOUT}.free_cache_engine=false", f"{KEY}=0.9", "trainer.device=cpu"],
    ],
)
def test_what_fits_is_accepted(example: Compose, overrides: list[str]) -> None:
    check_config(example(*overrides))


@pytest.mark.parametrize(
    ("overrides", "start", "words"),
    [
        # The trainer's share is 4 + 8 bytes a parameter over four GPUs.
        ([f"{KEY}=0.9"], f"{KEY}=0.9", ["0.90 x 80 GB + 12.0 GB", "+ 2 GB", "= 86.0 GB on a GPU of 80 GB"]),
        (["trainer.n_gpus_per_node=1"], f"{KEY}=0.45", ["0.45 x 80 GB + 48.0 GB", "= 86.0 GB"]),
        (
            [f"{FSDP}.fsdp_size=2", f"{ROLLOUT}.gpu_memory_utilization=0.8", f"{KEY}=0.5"],
            f"{ROLLOUT}.gpu_memory_utilization=0.8",
            ["0.80 x 80 GB + 24.0 GB", "= 90.0 GB"],
        ),
        # The weights must leave room for a KV cache, wherever the engine is.
        ([f"{KEY}=0.1"], f"{KEY}=0.1", ["the weights alone have 8.0 GB", "0.10 x 80 GB = 8.0 GB"]),
        ([f"{KEY}=0.1", STANDALONE], f"{KEY}=0.1", ["the weights alone have 8.0 GB"]),
        # What does not sleep.
        ([f"{ROLLOUT}.free_cache_engine=false", f"{KEY}=0.6"], f"{KEY}=0.6", ["0.60 + 0.50", "= 1.10 of a GPU"]),
        (
            [f"{ROLLOUT}.free_cache_engine=false", f"{KEY}=0.4"],
            f"{KEY}=0.4",
            ["0.40 x 80 GB + 12.0 GB", "+ 0.50 x 80 GB of the rollout engine", "= 84.0 GB on a GPU of 80 GB"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_sum(
    example: Compose, overrides: list[str], start: str, words: list[str]
) -> None:
    text = refusal(example(*overrides))
    assert text.startswith(f"{start}: "), text
    for word in words:
        assert word in text, text


def test_without_a_gpu_or_a_model_here_only_shares_are_added_up(
    example: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, arguments in (("gpu_bytes", []), ("parameters", ["path"])):
        with monkeypatch.context() as patch:
            patch.setattr(snapshot_memory, name, lambda *_: None)
            check_config(example(f"{KEY}=0.99"))
            assert "of a GPU" in refusal(example(f"{KEY}=0.99", f"{ROLLOUT}.free_cache_engine=false")), arguments


@pytest.mark.parametrize(
    ("overrides", "bytes_a_parameter"),
    [
        ([], 12),
        ([f"{FSDP}.optimizer_offload=true"], 4),
        ([f"{FSDP}.param_offload=true"], 8),
        ([f"{FSDP}.model_dtype=bf16"], 6),
        (["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true"], 4),
        (["trainer.nnodes=2"], 6),
        ([f"{FSDP}.fsdp_size=2"], 24),
        (["actor_rollout_ref.actor.strategy=megatron"], 0),  # not known here
    ],
)
def test_what_the_trainer_keeps(example: Compose, overrides: list[str], bytes_a_parameter: float) -> None:
    assert trainer_bytes(example(*overrides), 1e9) == bytes_a_parameter * 1e9 / 4  # four GPUs


def test_parameters_are_counted_without_reading_them(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert parameters(str(tmp_path)) == 22
    assert parameters("nobody/nothing") is None
    assert parameters(str(tmp_path / "none")) is None


def test_the_smallest_gpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    tool.chmod(0o755)
    assert gpu_bytes() == 40960 * 2**20
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert gpu_bytes() is None
