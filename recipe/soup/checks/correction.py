"""Refuse a rollout correction that verl would refuse after its first rollout."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse

KEY = "algorithm.rollout_correction"
WEIGHTS = ("token", "sequence")
REJECTIONS = tuple(f"token_k{k}" for k in (1, 2, 3)) + tuple(
    f"seq_{how}_k{k}" for how in ("sum", "mean", "max") for k in (1, 2, 3) if (how, k) != ("max", 1)
)
"""What verl knows under `rollout_is` and `rollout_rs`."""


def check_correction(config: DictConfig) -> None:
    """Check names and thresholds of importance weights and rejection.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    correction = OmegaConf.select(config, KEY)
    if not correction or correction.get("bypass_mode"):
        return
    level, rejection = correction.get("rollout_is"), correction.get("rollout_rs")
    if level is not None:
        if level not in WEIGHTS:
            raise refuse(f"{KEY}.rollout_is", level, f"choose one of {', '.join(WEIGHTS)}, or null.")
        _check_bounds(f"{KEY}.rollout_is_threshold", correction.get("rollout_is_threshold"), pair=True)
    if rejection is not None:
        names = [name.strip() for name in str(rejection).split(",")]
        unknown = [name for name in names if name not in REJECTIONS]
        if unknown:
            raise refuse(f"{KEY}.rollout_rs", rejection, f"choose among {', '.join(REJECTIONS)}, or null.")
        key, given = f"{KEY}.rollout_rs_threshold", correction.get("rollout_rs_threshold")
        parts = [] if given is None else [part.strip() for part in str(given).split(",") if part.strip()]
        if len(parts) not in (1, len(names)):
            why = f"rollout_rs={rejection} rejects by a threshold"
            raise refuse(key, given, f"{why}; give one, e.g. 2.0, or one for each of its names.")
        for name, part in zip(names, parts * len(names) if len(parts) == 1 else parts, strict=True):
            _check_bounds(key, part, pair=name.endswith("k1"))


def _check_bounds(key: str, given: Any, pair: bool) -> None:
    """Check a threshold: an upper bound, or `lower_upper` where verl reads two."""
    parts = str(given).split("_", 1)
    try:
        bounds = [float(part) for part in parts] if pair or len(parts) == 1 else [0.0]
    except ValueError:
        bounds = [0.0]
    if not (0 < bounds[0] <= bounds[-1]):
        raise refuse(key, given, f"a number above 0{', or two as lower_upper,' if pair else ''} is wanted, e.g. 2.0.")
