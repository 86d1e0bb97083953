"""A trainer apart from its rollout: what verl would assert minutes later, or never notice."""

from collections.abc import Callable
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import DictConfig
from refusals import sentence

from recipe.soup.checks import separate_async
from recipe.soup.checks.batches import check_batches
from recipe.soup.checks.separate_async import check_separate_async

Compose = Callable[..., DictConfig]
MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
STEPS = "trainer.v1.separate_async.parameter_sync_step"
ON_CPU = ("hardware=cpu", "example=countdown", f"{ROLLOUT}.nnodes=1", f"{STEPS}=2")
"""Two mini-batches of 8 prompts."""

modes = pytest.mark.parametrize("mode", ["soup_separate_async", "separate_async"])


def config(composed: Compose, mode: str, *overrides: str) -> DictConfig:
    algorithm = "algorithm=soup" if mode.startswith("soup") else "algorithm=verl"
    return composed(algorithm, *ON_CPU, f"trainer.v1.trainer_mode={mode}", *overrides)


@modes
@pytest.mark.parametrize(
    "overrides",
    [
        "",
        f"{MODEL}.lora_rank=4 {MODEL}.lora.merge=true",
        f"{ROLLOUT}.checkpoint_engine.backend=nccl",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16 trainer.v1.separate_async.parameter_sync_step=1",
    ],
)
def test_what_fits_is_accepted(composed: Compose, mode: str, overrides: str) -> None:
    check_separate_async(config(composed, mode, *overrides.split()))


@modes
@pytest.mark.parametrize(
    ("refused", "advice"),
    [
        (f"{STEPS}=4", "set it to 2"),
        (f"{ROLLOUT}.nnodes=0", "1 or more"),
        (f"{ROLLOUT}.nnodes=-1", "1 or more"),
        (f"{ROLLOUT}.nnodes=0.5", "1 or more"),
        (f"{ROLLOUT}.n_gpus_per_node=0", "1 or more"),
        (f"{ROLLOUT}.checkpoint_engine.backend=naive", "use nccl, or ray_store"),
        (f"{MODEL}.lora_rank=4", "model.lora.merge to True"),
        (f"{MODEL}.lora.rank=4", "model.lora.merge to True"),
        (f"{MODEL}.lora_adapter_path=adapter", "model.lora.merge to True"),
        ("reward.reward_model.enable=true", "reward.reward_model.enable_resource_pool=False"),
    ],
)
def test_what_does_not_is_refused_by_name(composed: Compose, mode: str, refused: str, advice: str) -> None:
    text = sentence(check_separate_async, config(composed, mode, refused))
    assert text.startswith(f"{refused}: ") or "reward_model" in refused
    assert advice in text
    # Elsewhere it is none of this check's business.
    check_separate_async(composed("algorithm=soup", *ON_CPU, refused))


@modes
@pytest.mark.parametrize("installed", [False, True])
def test_what_nccl_needs_is_asked_for_before_any_worker_starts(
    composed: Compose, mode: str, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separate_async, "find_spec", lambda name: name if installed else None)
    given = config(composed, mode, f"{ROLLOUT}.checkpoint_engine.backend=nccl", "trainer.device=cuda")
    if installed:
        return check_separate_async(given)
    assert "pip install 'verl[cupy-cu130]==" in sentence(check_separate_async, given)


def test_verl_names_what_its_nccl_engine_needs() -> None:
    """The import of verl.checkpoint_engine.nccl_checkpoint_engine, and the extra of verl that brings it."""
    engine = find_spec("verl.checkpoint_engine.nccl_checkpoint_engine")
    assert engine is not None
    assert "import cupy" in Path(str(engine.origin)).read_text()
    assert any("cupy" in line and "cupy-cu130" in line for line in requires("verl") or [])


@modes
def test_engines_are_laid_out_over_the_rollouts_own_gpus(composed: Compose, mode: str) -> None:
    two = (f"{ROLLOUT}.tensor_model_parallel_size=2", f"{ROLLOUT}.n_gpus_per_node=2")
    check_batches(config(composed, mode, *two))
    text = sentence(check_batches, config(composed, mode, two[0]))
    assert f"1 x 1 GPUs ({ROLLOUT}.nnodes" in text


@modes
def test_log_probs_are_computed_for_one_mini_batch_at_a_time(composed: Compose, mode: str) -> None:
    fixed = (
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=128",
    )
    assert "the 64 samples of a rank" in sentence(check_batches, config(composed, mode, *fixed))
