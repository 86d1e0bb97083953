"""Choose the trainer's attention: flash-attn if it can be imported, else torch's own (sdpa).

verl's default is flash_attention_2, and without flash-attn a run fails in a worker, minutes after the start. With the
resolvers below, the config chooses:

    actor_rollout_ref:
      model:
        use_remove_padding: ${can_pack:${actor_rollout_ref.model.override_config.attn_implementation}}
        override_config:
          attn_implementation: ${default_attention:}

They look at the process that resolves the config, which is verl's task runner, and `callbacks.CheckAttention` at the
driver. On a cluster every node needs the same environment anyway.
"""

import importlib
from functools import cache

from verl_ext.errors import first_line

FLASH, TORCH = "flash_attention_2", "sdpa"


@cache
def why_no_flash_attn() -> str | None:
    """Import flash-attn; return the first line of the error if that fails, else None.

    It may be installed and built for another torch.
    """
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        return first_line(error)
    return None


def default_attention() -> str:
    """Return transformers' name of the attention: verl's default, or sdpa if flash-attn cannot be imported."""
    return FLASH if why_no_flash_attn() is None else TORCH


def can_pack(attention: str) -> bool:
    """Whether to pack sequences without padding. Not with sdpa, whose mask would be the square of all their tokens."""
    return "flash" in attention
