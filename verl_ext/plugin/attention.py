"""Which attention the trainer computes with: flash-attn where it can be imported, torch's own (sdpa) elsewhere.

verl's default is flash_attention_2, and a machine without flash-attn learns of that in a worker, minutes after the
start. The resolvers below choose in the config instead:

    actor_rollout_ref:
      model:
        use_remove_padding: ${can_pack:${actor_rollout_ref.model.override_config.attn_implementation}}
        override_config:
          attn_implementation: ${default_attention:}

They answer in the process that resolves the config, verl's task runner, and `callbacks.CheckAttention` in the driver:
on a cluster every node needs the same environment anyway.
"""

import importlib
from functools import cache

FLASH, TORCH = "flash_attention_2", "sdpa"


@cache
def why_no_flash_attn() -> str | None:
    """What its import says, or None where it works. Only an import tells: one built for another torch is installed."""
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def default_attention() -> str:
    """transformers' name of the attention: verl's default, or sdpa where flash-attn cannot be imported."""
    return FLASH if why_no_flash_attn() is None else TORCH


def can_pack(attention: str) -> bool:
    """Whether sequences are packed without padding: with sdpa that takes a mask of the square of all their tokens."""
    return "flash" in attention
