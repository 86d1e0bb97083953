"""OmegaConf resolvers for configs that must find files next to a Python package, or what this machine has."""

from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from verl_ext.attention import can_pack, default_attention


def package_dir(package: str) -> str:
    """Absolute folder of an importable package, e.g. `${package_dir:examples.countdown}/data/train.parquet`.

    Raises:
        ModuleNotFoundError: `package` is not importable in this process.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"${{package_dir:{package}}}: no such package; run from the repository's root")
    return str(Path(next(iter(spec.submodule_search_locations))).resolve())


def register_resolvers() -> None:
    """Make them known to OmegaConf in this process; calling it again changes nothing."""
    for resolver in (package_dir, default_attention, can_pack):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
