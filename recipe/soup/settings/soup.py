"""The keys under `algorithm.soup` and their defaults; `bounds.py` checks them."""

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.soup.errors import refuse

POLICIES = ("lagged", "pool", "base", "best")
BY_AGE = ("lagged", "pool")


@dataclass
class PrefixLengthSettings:
    """How many tokens of a mixed sample come from the historical policy. The paper does not say; all our choice."""

    distribution: str = "uniform"
    """`uniform`: from `min` to `max`, both included; `beta`: Beta(`alpha`, `beta`) stretched over the same range;
    `fixed`: always `max`; `whole`: the whole response, which is trajectory-level mixing."""
    unit: str = "tokens"
    """Of `min` and `max`: `tokens`, or `fraction` of the prompt's typical response length."""
    min: float | None = None
    """At least 1 token; null: 1 token, or fraction 0."""
    max: float | None = None
    """At most `data.max_response_length - 1` tokens, or fraction 1; null: half of `data.max_response_length`, or
    fraction 0.5."""
    alpha: float = 2.0
    """Of the beta distribution; above 0."""
    beta: float = 2.0
    """Of the beta distribution; above 0."""


@dataclass
class ScheduleSettings:
    """How a value moves over training. The paper does not say; Prefix-RFT lowers its prefix share by cosine."""

    shape: str = "constant"
    """`constant`, or `linear` or `cosine` from the setting's own value to `end`."""
    end: float | None = None
    """The value after `steps`, in the setting's own unit; needed unless constant."""
    steps: int | None = None
    """Step at which `end` is reached; null: the run's last one."""
    warmup: int = 0
    """Over so many first steps the value rises linearly from 0."""


@dataclass
class Schedules:
    """The settings that can move."""

    mixed_share: ScheduleSettings = field(default_factory=ScheduleSettings)
    prefix_length: ScheduleSettings = field(default_factory=ScheduleSettings)
    """Moves `prefix_length.max`."""
    lag: ScheduleSettings = field(default_factory=ScheduleSettings)


@dataclass
class ClipSettings:
    """Clip range of the ratio on the prefix, around 1. The paper does not say whether the prefix has its own."""

    low: float | None = None
    """null: verl's `clip_ratio_low`; `inf`: none."""
    high: float | None = None
    """null: verl's `clip_ratio_high`; `inf`: none."""


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
    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory that the historical engine plans with while it is awake, as the rollout's key of this
    name; null: that of the rollout, less a tenth of it when both are colocated. On a CPU nothing heeds it."""
    max_num_seqs: int | None = None
    """Responses that the historical engine decodes at once; null: the rollout's."""

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
    lag_distribution: str = "fixed"
    """`fixed`: always `lag`; `uniform`: drawn from 1 to `lag`; `geometric`: the same, with a probability that halves
    every quarter of `lag`. Drawn per prompt with `lookahead`, per step with `snapshot`."""
    mixed_share: float = 0.5
    """Share of a prompt's samples that get a historical prefix, in [0, 1]; 0 is GRPO."""
    samples_per_prefix: int = 1
    """Samples of a prompt that continue the same prefix."""
    prefix_length: PrefixLengthSettings = field(default_factory=PrefixLengthSettings)
    selection: str = "random"
    """Which of the available prefixes is used: `random`; `failed` or `successful` (of `replay`ed responses, by
    reward); `entropic`, the one with the largest mean -log-prob (with `replay`, of the whole response)."""
    candidates: int = 1
    """Prefixes to sample for each one that `selection=entropic` uses; `replay` chooses among a visit's responses."""
    schedules: Schedules = field(default_factory=Schedules)
    warm_start: str = "ramp"
    """What to do before the version `lag` updates ago exists: `pure` no mixing, `fill` version 0, `ramp` a growing
    lag."""
    on_eos: str = "keep"
    """A prefix that ended its response: `keep` it as the complete sample, or `cut` its end token."""
    behavior_log_probs: str = "auto"
    """Who computes the prefix's behaviour log-probs: the `rollout` engine, or the `trainer`, once, while it holds the
    weights that sampled them; `auto`: see `run_settings.py`."""
    ratio: str = "behavior"
    """How the prefix enters the loss; the names are those of `losses/registry.py`."""
    shaping_gamma: float = 0.1
    """Of the ratios `shaped` and `luffy`; above 0. LUFFY's value."""
    prefix_clip: ClipSettings = field(default_factory=ClipSettings)
    prefix_gradient: float = 1.0
    """Share of a batch's prefix tokens that have a gradient, those with the highest entropy first; 1 all, 0 none."""
    second_moment: float | None = None
    """M2PO's budget: prefix tokens whose log-ratios drive the mean of their squares above it have no gradient; null:
    no budget."""
    loss_tokens: str = "all"
    """What the loss is averaged over: `all` response tokens, or those that are `trained`, which leaves prefix tokens
    without a gradient out of KL loss and entropy bonus as well."""
    baseline: str = "group"
    """What a reward is compared with; the names are those of `advantages.py`."""
    snapshot: SnapshotSettings = field(default_factory=SnapshotSettings)
    """Only for `source=snapshot`."""
    dump_rows: int | None = None
    """Samples of a step that `trainer.rollout_data_dir` gets at most; null: all."""
    max_lost_share: float = 0.05
    """A step that lost a larger share of its samples, because generation or reward failed, ends the run; in [0, 1]."""

    @property
    def mixes(self) -> bool:
        """Whether a run with these settings ever trains on a prefix."""
        by_lag = self.source == "lookahead" or (self.source == "snapshot" and self.snapshot.policy == "lagged")
        shares = (self.mixed_share, self.schedules.mixed_share.end or 0)
        return max(shares) > 0 and (self.largest_lag > 0 or not by_lag)

    @property
    def weighs(self) -> bool:
        """Whether some prefix tokens may have no gradient."""
        return self.prefix_gradient < 1 or self.second_moment is not None

    @property
    def mixes_lags(self) -> bool:
        """Whether prefixes of one run differ in age once it is warm."""
        snapshot = self.snapshot
        exact = self.source == "lookahead" or (snapshot.policy == "lagged" and snapshot.every == 1)
        moves = self.schedules.lag.shape != "constant" or self.schedules.lag.warmup > 0
        return self.mixes and (self.source == "replay" or not exact or self.lag_distribution != "fixed" or moves)

    @property
    def largest_lag(self) -> int:
        """Over the whole run, in updates."""
        return max(self.lag, round(self.schedules.lag.end or 0))


def parse_settings(config: DictConfig | None, response_length: int) -> SoupSettings:
    """Read and check `algorithm.soup`.

    Args:
        config: the node `algorithm.soup`, or None if there is none.
        response_length: `data.max_response_length`, in tokens; bounds the prefix.

    Raises:
        SystemExit: an unknown key, a value of the wrong type or outside its bounds; one sentence.
    """
    from recipe.soup.bounds import check_bounds

    known = OmegaConf.structured(SoupSettings)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(known, config or {}))
    except OmegaConfBaseException as error:
        key = f"algorithm.soup.{error.full_key}" if error.full_key else "algorithm.soup"
        value = OmegaConf.select(config or OmegaConf.create(), error.full_key or "", default="?")
        reason = (error.msg or str(error)).splitlines()[0]
        raise refuse(key, value, f"{reason}; see `algorithm.soup` in recipe/soup/README.md.") from None
    assert isinstance(settings, SoupSettings)
    check_bounds(settings, response_length)
    return settings
