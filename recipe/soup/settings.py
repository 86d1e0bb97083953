"""The keys under `algorithm.soup`, their defaults and their bounds. Imports no verl."""

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SOURCES = ("lookahead", "snapshot", "replay")
DISTRIBUTIONS = ("uniform", "fixed", "whole")
POLICIES = ("lagged", "pool", "base", "best")
BY_AGE = ("lagged", "pool")
STORAGES = ("memory", "disk")
PLACEMENTS = ("colocated", "standalone")
EVICTIONS = ("oldest", "log_spaced")
WARM_STARTS = ("pure", "fill", "ramp")
ON_EOS = ("keep", "cut")
RATIOS = ("behavior",)


@dataclass
class PrefixLengthSettings:
    """How many tokens of a mixed sample come from the historical policy. The paper does not say; all our choice."""

    distribution: str = "uniform"
    """`uniform`: from `min` to `max`, both included; `fixed`: always `max`; `whole`: the whole response, which is
    trajectory-level mixing."""
    min: int = 1
    """Tokens, at least 1."""
    max: int | None = None
    """Tokens, at most `data.max_response_length - 1`; null: half of `data.max_response_length`."""


@dataclass
class SnapshotSettings:
    """Which past weights `source=snapshot` keeps and samples with. The paper says "an earlier checkpoint"."""

    policy: str = "lagged"
    """`lagged`: the youngest snapshot that is at least `lag` updates old; `pool`: one of those kept, drawn for each
    step; `base`: version 0; `best`: the best validation so far; anything else: a checkpoint's path or a model's
    name."""
    every: int = 4
    """Updates from one snapshot to the next."""
    keep: int | None = None
    """At most so many; null: as many as `lag` needs."""
    eviction: str = "oldest"
    """What goes when there are too many: the `oldest`, or one such that ages stay `log_spaced`."""
    storage: str = "memory"
    """`memory`: Ray's object store; `disk`: safetensors files under `trainer.default_local_dir`."""
    placement: str = "colocated"
    """`colocated`: on the trainer's GPUs, asleep unless it samples; `standalone`: on `n_gpus` of its own, where it
    samples while the trainer goes on."""
    n_gpus: int | None = None
    """Only for `standalone`; null: those of one replica."""

    def needed(self, lag: int) -> int:
        """Snapshots that must be kept so that one is `lag` updates old when it is asked for."""
        return -(-max(lag - 1, 0) // self.every) + 1


@dataclass
class SoupSettings:
    """One field per key; `recipe/soup/README.md` says next to each what the paper says of it."""

    source: str = "lookahead"
    """Where prefixes come from."""
    lag: int = 16
    """Age of the historical policy in updates, at least 0. A lag longer than the run is only a longer warm start."""
    mixed_share: float = 0.5
    """Share of a prompt's samples that get a historical prefix, in [0, 1]; 0 is GRPO."""
    prefix_length: PrefixLengthSettings = field(default_factory=PrefixLengthSettings)
    warm_start: str = "ramp"
    """What to do before the version `lag` updates ago exists: `pure` no mixing, `fill` version 0, `ramp` a growing
    lag."""
    on_eos: str = "keep"
    """A prefix that ended its response: `keep` it as the complete sample, or `cut` its end token."""
    ratio: str = "behavior"
    """Old log-probs of the loss: those of the policy that sampled each token."""
    snapshot: SnapshotSettings = field(default_factory=SnapshotSettings)
    """Only for `source=snapshot`."""

    @property
    def mixes(self) -> bool:
        """Whether a run with these settings ever trains on a prefix."""
        by_lag = self.source == "lookahead" or (self.source == "snapshot" and self.snapshot.policy == "lagged")
        return self.mixed_share > 0 and (self.lag > 0 or not by_lag)


def refuse(key: str, value: object, why: str) -> SystemExit:
    """The one form of all our refusals: which key, which value, what is wrong and what to do."""
    return SystemExit(f"{key}={value}: {why}")


def parse_settings(config: DictConfig | None, response_length: int) -> SoupSettings:
    """Read and check `algorithm.soup`.

    Args:
        config: the node `algorithm.soup`, or None if there is none.
        response_length: `data.max_response_length`, in tokens; bounds the prefix.

    Raises:
        SystemExit: an unknown key, a value of the wrong type or outside its bounds; one sentence.
    """
    known = OmegaConf.structured(SoupSettings)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(known, config or {}))
    except OmegaConfBaseException as error:
        key = f"algorithm.soup.{error.full_key}" if error.full_key else "algorithm.soup"
        value = OmegaConf.select(config or OmegaConf.create(), error.full_key or "", default="?")
        reason = (error.msg or str(error)).splitlines()[0]
        raise refuse(key, value, f"{reason}; see `algorithm.soup` in recipe/soup/README.md.") from None
    assert isinstance(settings, SoupSettings)
    _check_choices(settings)
    _check_bounds(settings, response_length)
    return settings


def _check_choices(settings: SoupSettings) -> None:
    for key, value, choices in (
        ("source", settings.source, SOURCES),
        ("prefix_length.distribution", settings.prefix_length.distribution, DISTRIBUTIONS),
        ("warm_start", settings.warm_start, WARM_STARTS),
        ("on_eos", settings.on_eos, ON_EOS),
        ("ratio", settings.ratio, RATIOS),
        ("snapshot.eviction", settings.snapshot.eviction, EVICTIONS),
        ("snapshot.storage", settings.snapshot.storage, STORAGES),
        ("snapshot.placement", settings.snapshot.placement, PLACEMENTS),
    ):
        if value not in choices:
            raise refuse(f"algorithm.soup.{key}", value, f"choose one of {', '.join(choices)}.")


def _check_bounds(settings: SoupSettings, response_length: int) -> None:
    if not 0.0 <= settings.mixed_share <= 1.0:
        raise refuse("algorithm.soup.mixed_share", settings.mixed_share, "a share lies between 0 and 1.")
    if settings.lag < 0:
        raise refuse("algorithm.soup.lag", settings.lag, "a lag counts updates back in time; use 0 or more.")
    _check_snapshots(settings)
    length = settings.prefix_length
    if length.distribution == "whole":
        if settings.on_eos == "cut":
            raise refuse("algorithm.soup.on_eos", "cut", "prefix_length.distribution=whole needs `keep`.")
        length.max = response_length
        return
    if length.max is None:
        length.max = max(response_length // 2, 1)
    if settings.mixed_share > 0 and not 1 <= length.max <= response_length - 1:
        raise refuse(
            "algorithm.soup.prefix_length.max",
            length.max,
            f"a prefix has 1 to data.max_response_length - 1 = {response_length - 1} tokens, so that the current "
            "policy has one left to write.",
        )
    if settings.mixed_share > 0 and not 1 <= length.min <= length.max:
        raise refuse(
            "algorithm.soup.prefix_length.min", length.min, f"use 1 to prefix_length.max = {length.max} tokens."
        )


def _check_snapshots(settings: SoupSettings) -> None:
    snapshot = settings.snapshot
    if snapshot.every < 1:
        raise refuse("algorithm.soup.snapshot.every", snapshot.every, "a snapshot is taken every 1 or more updates.")
    if snapshot.policy == "lagged" and snapshot.eviction != "oldest":
        raise refuse(
            "algorithm.soup.snapshot.eviction",
            snapshot.eviction,
            "with policy=lagged the age would wander; use policy=pool, or eviction=oldest.",
        )
    needed = snapshot.needed(settings.lag)
    if snapshot.keep is None:
        snapshot.keep = needed
    if snapshot.keep < 1:
        raise refuse("algorithm.soup.snapshot.keep", snapshot.keep, "keep at least 1.")
    if snapshot.policy == "lagged" and snapshot.keep < needed:
        raise refuse(
            "algorithm.soup.snapshot.keep",
            snapshot.keep,
            f"with lag={settings.lag} and every={snapshot.every} the snapshot that is old enough would be gone; "
            f"keep {needed} or more, or take them less often.",
        )
