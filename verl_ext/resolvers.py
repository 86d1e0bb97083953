"""OmegaConf resolvers: values in our configs that depend on where a package lies, or on another choice."""

from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf


def package_dir(package: str) -> str:
    """Absolute folder of an importable package, e.g. `${package_dir:examples.countdown}/data/train.parquet`.

    Raises:
        ModuleNotFoundError: `package` is not importable in this process.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"${{package_dir:{package}}}: no such package; run from the repository's root")
    return str(Path(next(iter(spec.submodule_search_locations))).resolve())


def training_strategy(model_engine: str) -> str:
    """verl's `actor.strategy` of a `model_engine`, as its config has it, but with fsdp2 in the place of fsdp."""
    return "fsdp2" if model_engine == "dp" else model_engine


def register_resolvers() -> None:
    """Make both known to OmegaConf in this process; calling it again changes nothing."""
    for resolver in (package_dir, training_strategy):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
