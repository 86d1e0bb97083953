"""OmegaConf resolvers: files next to a Python package, what this machine has, and what depends on the model's size."""

import json
from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from verl_ext.plugin.attention import can_pack, default_attention


def package_dir(package: str) -> str:
    """Absolute folder of an importable package, e.g. `${package_dir:examples.countdown}/data/train.parquet`.

    Raises:
        ModuleNotFoundError: `package` is not importable in this process.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"${{package_dir:{package}}}: no such package; run from the repository's root")
    return str(Path(next(iter(spec.submodule_search_locations))).resolve())


SMALLEST_BUCKET = 64
"""MiB. More than all weights of a toy model."""
BYTES = 4
"""Of a weight on its way from trainer to engine: verl sends what the trainer holds, float32 on a CPU."""
VERLS_BUCKET = 2048
"""MiB, verl's own default: for a model that is not on this machine yet."""


def weight_bucket_megabytes(model: str) -> int:
    """MiB that one bucket of weights must have so that the model's largest matrix fits into it, at least 64.

    verl asserts that each weight fits, where weights travel by shared memory. The largest is the embedding (or the
    head, of the same shape), unless a small vocabulary leaves that to a layer of the MLP.

    Args:
        model: folder of a Hugging Face model, or its name on the hub.
    """
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, "config.json")
        except HFValidationError:  # a folder that is not there: whoever loads it will say so
            cached = None
        if not isinstance(cached, str):
            return VERLS_BUCKET
        file = Path(cached)
    config = json.loads(file.read_text())
    config = config.get("text_config", config)
    rows = max(config.get("vocab_size", 0), config.get("intermediate_size", 0))
    return max(SMALLEST_BUCKET, -(-rows * config.get("hidden_size", 0) * BYTES // 2**20))


def training_strategy(model_engine: str) -> str:
    """verl's `actor.strategy` of a `model_engine`, as its config has it, but with fsdp2 in the place of fsdp."""
    return "fsdp2" if model_engine == "dp" else model_engine


def register_resolvers() -> None:
    """Make them known to OmegaConf in this process; calling it again changes nothing."""
    for resolver in (package_dir, default_attention, can_pack, training_strategy, weight_bucket_megabytes):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
