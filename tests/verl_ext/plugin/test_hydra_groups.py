"""Our groups in verl's config, and verl's config without them."""

import subprocess
import sys
from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

Compose = Callable[..., DictConfig]

PRINT_JOB = """
import runpy, sys
{prepare}
sys.argv = ["main_ppo", "--cfg", "job"]
runpy.run_module("verl.trainer.main_ppo", run_name="__main__")
"""
WITHOUT_US = "import verl_ext.plugin.hydra_source as s; s.VerlGroups.manipulate_search_path = lambda self, path: None"


def test_without_our_groups_the_config_is_byte_identical_to_verls(clean_environ: dict[str, str]) -> None:
    def printed_job(prepare: str) -> str:
        command = [sys.executable, "-c", PRINT_JOB.format(prepare=prepare)]
        return subprocess.run(command, env=clean_environ, capture_output=True, text=True, check=True).stdout

    ours, plain = printed_job(""), printed_job(WITHOUT_US)
    assert len(plain) > 10_000
    assert ours == plain


def test_later_overrides_win_over_every_group(composed: Compose) -> None:
    config = composed("algorithm=soup", "hardware=cpu", "example=countdown", "algorithm.soup.lag=5", "trainer.device=x")
    assert config.algorithm.soup.lag == 5
    assert config.algorithm.adv_estimator == "soup"
    assert config.trainer.device == "x"


def test_verls_own_groups_still_compose(composed: Compose) -> None:
    assert composed("algorithm=soup", "model_engine=megatron").actor_rollout_ref.actor.strategy == "megatron"


def test_twins_differ_in_nothing_but_the_algorithm(composed: Compose) -> None:
    flat = {}
    for name in ("soup", "grpo"):
        config = composed(f"algorithm={name}", "hardware=cpu", "example=countdown")
        container = OmegaConf.to_container(config, resolve=True)
        flat[name] = dict(_leaves(container))
    differing = {
        key for key in flat["soup"].keys() | flat["grpo"].keys() if flat["soup"].get(key) != flat["grpo"].get(key)
    }
    allowed = ("algorithm.soup.", "algorithm.adv_estimator", "actor_rollout_ref.actor.policy_loss.loss_mode")
    paths = {key for key in differing if not key.startswith(allowed)}
    # What is left names the run: twins write to folders of their own.
    assert all("grpo" in str(flat["grpo"][key]) and "soup" in str(flat["soup"][key]) for key in paths)
    assert "trainer.default_local_dir" in paths


def _leaves(node: object, path: str = "") -> "list[tuple[str, object]]":
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in _leaves(value, f"{path}.{key}".lstrip("."))]
    return [(path, node)]


def test_ray_workers_get_the_platform_of_the_driver(composed: Compose) -> None:
    from verl_ext.cpu import CPU_ENV

    for_workers = OmegaConf.to_container(composed("hardware=cpu").ray_kwargs.ray_init.runtime_env.env_vars)
    assert isinstance(for_workers, dict)
    of_verl = {key: value for key, value in for_workers.items() if str(key).startswith("VERL_")}
    assert of_verl == {key: value for key, value in CPU_ENV.items() if key.startswith("VERL_")}


def test_fp32_is_fp32_in_trainer_and_engine(composed: Compose) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    for overrides in (["precision=fp32"], ["hardware=cpu"], ["hardware=cpu", "precision=fp32"]):
        config = composed("algorithm=soup", *overrides)
        policy = config.actor_rollout_ref
        assert policy.rollout.dtype == "float32"
        for role in (policy.actor, policy.ref):
            engine = omega_conf_to_dataclass(role.fsdp_config)
            assert (engine.dtype, engine.model_dtype, dict(engine.mixed_precision)) == ("float32", "fp32", fp32)
        assert policy.model.override_config.attn_implementation == "sdpa"  # flash-attn knows no fp32
        assert policy.model.use_remove_padding is False
        assert config.ray_kwargs.ray_init.runtime_env.env_vars.TRITON_F32_DEFAULT == "ieee"
    assert composed("algorithm=soup", "precision=fp32").trainer.device == "cuda"


def test_tf32_is_off_in_fp32_whatever_the_image_says(composed: Compose, clean_environ: dict[str, str]) -> None:
    """Also what we rely on: vLLM's workers compute as torch does by default, in fp32."""
    import vllm.envs

    def precision(override: str) -> str:
        environ = {**clean_environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": override}
        script = "import torch; print(torch.get_float32_matmul_precision())"
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.strip()

    ours = composed("precision=fp32").ray_kwargs.ray_init.runtime_env.env_vars.TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    assert (precision("1"), precision(ours)) == ("high", "highest")
    assert vllm.envs.VLLM_FLOAT32_MATMUL_PRECISION == "highest"
