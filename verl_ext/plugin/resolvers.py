"""OmegaConf resolvers: files beside a package, what this machine has, what depends on the model or another key."""

import json
from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from verl_ext.plugin.attention import can_pack, default_attention


def package_dir(package: str) -> str:
    """Return the absolute folder of an importable package, e.g. `${package_dir:examples.countdown}/data/train.parquet`.

    Raises:
        ModuleNotFoundError: `package` is not importable in this process.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"${{package_dir:{package}}}: no such package; run from the repository's root")
    return str(Path(next(iter(spec.submodule_search_locations))).resolve())


SMALLEST_BUCKET = 64
"""Smallest bucket in MiB: more than all weights of a toy model."""
BYTES = 4
"""Bytes of one weight as it is sent to the engine: verl sends what the trainer holds, which is float32 on a CPU."""
VERLS_BUCKET = 2048
"""verl's own default in MiB, for a model that is not on this machine yet."""


def weight_bucket_megabytes(model: str) -> int:
    """Return the MiB of the bucket in which weights travel: what the largest matrix needs, at least 64.

    Where that is not known, because the model is not on this machine yet, verl's own default.
    """
    needed = largest_matrix_megabytes(model)
    return VERLS_BUCKET if needed is None else max(SMALLEST_BUCKET, needed)


def largest_matrix_megabytes(model: str) -> int | None:
    """Return the MiB of the model's largest matrix on its way to the engine; None if the model is not here.

    Where weights travel through shared memory, verl asserts that each of them fits. The largest is the embedding (or
    the head, which has the same shape), or a layer of the MLP if the vocabulary is small.

    Args:
        model: folder of a Hugging Face model, or its name on the hub.
    """
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, "config.json")
        except HFValidationError:  # a folder that does not exist: whoever loads it will say so
            cached = None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    config = json.loads(file.read_text())
    config = config.get("text_config", config)
    rows = max(config.get("vocab_size", 0), config.get("intermediate_size", 0))
    return -(-rows * config.get("hidden_size", 0) * BYTES // 2**20)


def training_strategy(model_engine: str) -> str:
    """Return verl's own `actor.strategy` for a `model_engine`, but fsdp2 in place of fsdp."""
    return "fsdp2" if model_engine == "dp" else model_engine


def either(condition: bool, if_true: str, if_false: str) -> str:
    """Return one of two values, as another key says."""
    return if_true if condition else if_false


def register_resolvers() -> None:
    """Register all resolvers with OmegaConf in this process; calling it again changes nothing."""
    for resolver in (package_dir, default_attention, can_pack, either, training_strategy, weight_bucket_megabytes):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
