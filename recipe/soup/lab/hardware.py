"""Where the lab computes, and in which type; whether it takes the path of a language model or that of the toy.

The toy's path computes what a step needs in the plainest way, in float32 on a CPU, and its numbers stay what they
were. A language model would pay for that: its path computes each prompt once for all samples of a group, and on a GPU
replays recorded kernels. A test holds both together.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from recipe.soup.errors import refuse
from recipe.soup.run_settings import in_float16, in_float32

TOYS_VOCABULARY = 1024
"""Models with at most so many tokens are toys: their logits cost nothing, and their steps are mostly Python."""


@dataclass(frozen=True)
class Hardware:
    """What a run computes on.

    Attributes:
        device: of the model, and of the generator that samples with it; all else stays on the CPU.
        dtype: in which matrices are multiplied; weights and optimizer are float32.
        shares_prompts: whether the path of a language model is taken.
    """

    device: torch.device
    dtype: torch.dtype
    shares_prompts: bool

    def autocast(self) -> AbstractContextManager:
        """Compute in `dtype` meanwhile, from weights in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def has_gpu(config: DictConfig) -> bool:
    """Whether `trainer.device` asks for a GPU, as verl's default does, and there is one."""
    return config.trainer.device == "cuda" and torch.cuda.is_available()


def hardware(config: DictConfig, vocabulary: int) -> Hardware:
    """Read it off verl's keys.

    Args:
        config: verl's whole config.
        vocabulary: tokens that the model knows.

    Raises:
        SystemExit: float16, for which gradients would have to be scaled.
    """
    device = torch.device("cuda" if has_gpu(config) else "cpu")
    if device.type == "cpu" and vocabulary <= TOYS_VOCABULARY:
        return Hardware(device, torch.float32, shares_prompts=False)
    if in_float16(config):
        key = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
        raise refuse(key, "float16", "the lab computes in bfloat16 or float32; set it to bf16 or fp32.")
    dtype = torch.float32 if in_float32(config) else torch.bfloat16
    return Hardware(device, dtype, shares_prompts=True)
