"""`algorithm=verl`: GRPO in verl's own trainer, which differs from the twin in what is ours, and in nothing else."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

Compose = Callable[..., DictConfig]

OURS = {
    "algorithm.soup.mixed_share",
    "algorithm.soup.dump_rows",
    "algorithm.soup.max_lost_share",
    "algorithm.soup.broken_steps",
    "algorithm.soup.max_wait",
    "algorithm.soup.pass_k",
    "algorithm.soup.sigterm_grace",
    "actor_rollout_ref.rollout.agent.default_agent_loop",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls",
    "trainer.v1.trainer_mode",
}


def leaves(node: object, path: str = "") -> dict[str, object]:
    """Every value by its key, with dots; interpolations resolved."""
    if not isinstance(node, dict):
        return {path.removeprefix("."): node}
    return {key: value for name, child in node.items() for key, value in leaves(child, f"{path}.{name}").items()}


def values(config: DictConfig) -> dict[str, object]:
    return leaves(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("others", [[], ["hardware=cpu", "example=countdown"], ["example=math"]], ids=" ".join)
def test_it_differs_from_the_twin_in_what_is_ours(composed: Compose, others: list[str]) -> None:
    plain, twin = (values(composed(f"algorithm={name}", *others)) for name in ("verl", "grpo"))
    differing = {key for key in plain.keys() | twin.keys() if plain.get(key, "absent") != twin.get(key, "absent")}
    # The experiment, and the folders that are called after it.
    named = {key for key in differing if str(twin.get(key)).replace("grpo", "verl") == plain.get(key)}
    # Under hardware=cpu verl's worker needs the extension as well.
    needed = (
        {"actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls"} if "hardware=cpu" in others else set()
    )
    assert differing - named == OURS - needed
    assert {"trainer.experiment_name", "trainer.default_local_dir"} <= named


def test_trainer_and_agent_loop_are_verls(composed: Compose) -> None:
    plain, default = composed("algorithm=verl"), composed()
    for key in ("trainer.v1.trainer_mode", "actor_rollout_ref.rollout.agent.default_agent_loop"):
        assert OmegaConf.select(plain, key) == OmegaConf.select(default, key)
    assert "soup" not in plain.algorithm
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", ["algorithm=verl"], return_hydra_config=True)
        with pytest.raises(HydraException, match=r"algorithm\.soup\.mixed_share"):
            compose("ppo_trainer", ["algorithm=verl", "example=countdown", "algorithm.soup.mixed_share=0.5"])
    assert set(config.hydra.callbacks) == {"attention", "result", "last_words", "sigterm", "start"}


def test_the_lab_refuses_it_in_one_sentence(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    command = [sys.executable, "-m", "recipe.soup.lab", "algorithm=verl", "example=countdown"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("trainer.v1.trainer_mode=sync: only the real path can do that; ")
    assert "Traceback" not in done.stderr
