"""What is installed, against what this package asks for in its own metadata; and whether verl loads the plugin."""

import os
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

from omegaconf import DictConfig
from packaging.requirements import Requirement

OURS = "soup-verl"
PLUGINS = ("verl.plugins", "verl_ext")
"""Group and name of our entry point."""
POLICY = "VERL_USE_EXTERNAL_PLUGINS"


def check_versions(config: DictConfig) -> str:
    """Compare the pins of the extra `cpu` or `gpu`, and those that verl has in turn, with what is installed.

    Raises:
        SystemExit: another version, or none.
    """
    extra = "cpu" if config.trainer.device == "cpu" else "gpu"
    lists = {"cpu": "requirements-cpu.txt", "gpu": "requirements.txt"}
    try:
        asked = list(_pins(OURS, extra))
    except PackageNotFoundError:
        raise SystemExit(f"{OURS} is not installed here, so verl does not load it; run `pip install -e .`.") from None
    wrong = [line for line in map(_compare, asked) if line]
    if wrong:
        raise SystemExit(f"{'; '.join(wrong)}: install {lists[extra]} in an environment of its own.")
    return ", ".join(f"{name} {version(name)}" for name in ("verl", "torch", "ray", "transformers"))


def _pins(package: str, extra: str) -> list[Requirement]:
    """Return what a package asks for under an extra, with what verl asks for under its own."""
    found = []
    for text in requires(package) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        found.append(requirement)
        if requirement.name == "verl":
            for inner in requirement.extras:
                found += [pin for pin in _pins("verl", inner) if any(s.operator == "==" for s in pin.specifier)]
    return found


def _compare(asked: Requirement) -> str | None:
    try:
        there = version(asked.name)
    except PackageNotFoundError:
        return f"{asked.name} is missing ({asked.specifier or 'any version'} is wanted)"
    if asked.specifier.contains(there, prereleases=True):
        return None
    return f"{asked.name} is {there} ({asked.specifier} is wanted)"


def check_plugin(config: DictConfig) -> str:
    """Check that verl finds and loads our entry point, here and in the processes that inherit this environment.

    Raises:
        SystemExit: it does not.
    """
    group, name = PLUGINS
    policy = os.environ.get(POLICY, "auto").strip()
    if name not in entry_points(group=group).names:
        raise SystemExit(f"{OURS} is not installed here, so verl does not load it; run `pip install -e .`.")
    if policy.lower() != "auto" and name not in [part.strip() for part in policy.split(",")]:
        raise SystemExit(f"{POLICY}={policy}: keeps verl from loading {name}; unset it, or set it to auto.")
    import verl  # noqa: F401, TID251  (which loads its plugins)

    if f"{name}.plugin" not in sys.modules:
        raise SystemExit(f"verl did not load the plugin {name}; VERL_LOGGING_LEVEL=DEBUG shows why it failed.")
    return f"{name} is loaded"
