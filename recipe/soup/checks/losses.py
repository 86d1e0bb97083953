"""Refuse combinations of losses and estimators that do not compose, at start."""

from operator import attrgetter

from omegaconf import DictConfig, OmegaConf

from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.errors import refuse
from recipe.soup.settings import SoupSettings

ESTIMATORS = (
    "soup",
    "grpo",
    "grpo_vectorized",
    "rloo",
    "rloo_vectorized",
    "opo",
    "gpg",
    "grpo_passk",
    "reinforce_plus_plus_baseline",
    "pass_at_k",
)
"""Estimators that compare whole responses within a group, which is all that a baseline of ours changes: verl's, and
`soup` and `pass_at_k`."""
GROUP_ONLY = ("opo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline", "pass_at_k")
"""Estimators that do more than compare a sample's reward with those of its group."""
POLICY_LOSSES = (
    "soup",
    "vanilla",
    "gspo",
    "sapo",
    "cispo",
    "clip_cov",
    "kl_cov",
    "dppo_tv",
    "dppo_kl",
    "ctpo",
    "m2po",
)
"""Losses that take a ratio against the old log-probs, and weigh tokens; the last two are those of `verl_ext`."""
OVER_TOKENS = ("ctpo", "gspo")
"""Those in which a token's ratio is made of those of others: of all that the response mask leaves in the loss."""


def check_loss(config: DictConfig, settings: SoupSettings) -> None:
    """Check what the update needs of the composed config.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    estimator = config.algorithm.adv_estimator
    if estimator not in ESTIMATORS:
        why = "it has no value or baseline for prefix tokens that fits the policy that sampled them"
        if estimator == "gae":
            why = "a critic's advantages assume that the current policy sampled every token, also those of the prefix"
        raise refuse("algorithm.adv_estimator", estimator, f"{why}; choose one of {', '.join(ESTIMATORS)}.")
    ours = {"baseline": settings.baseline != "group", "demonstrations.gate": settings.demonstrations.gate != "always"}
    if any(ours.values()) and estimator in GROUP_ONLY:
        name = next(name for name, chosen in ours.items() if chosen)
        value = attrgetter(name)(settings)
        why = f"algorithm.soup.{name}={value} needs an estimator per sample; use soup or rloo."
        raise refuse("algorithm.adv_estimator", estimator, why)
    _check_policy_loss(config, settings)
    _check_weight(config, settings)
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode", default=False):
        _check_bypass(settings)


def _check_policy_loss(config: DictConfig, settings: SoupSettings) -> None:
    key = "actor_rollout_ref.actor.policy_loss.loss_mode"
    loss = OmegaConf.select(config, key, default="soup")
    if loss not in POLICY_LOSSES:
        why = "takes no ratio against each token's old log-prob, or no weight of each token; choose one of "
        raise refuse(key, loss, f"{why}{', '.join(POLICY_LOSSES)}.")
    own = settings.ratio not in ("behavior", "decoupled") or settings.prefix_clip.low is not None
    if loss != "soup" and (own or settings.prefix_clip.high is not None):
        raise refuse(key, loss, "only `soup` knows algorithm.soup.ratio and prefix_clip; set it to soup.")
    if loss in OVER_TOKENS and settings.loss_tokens == "trained":
        why = f"{key}={loss} would leave ratios of prefix tokens without a gradient out of those of later tokens"
        raise refuse("algorithm.soup.loss_tokens", "trained", f"{why}; use all, or soup as loss_mode.")


def _check_weight(config: DictConfig, settings: SoupSettings) -> None:
    """Refuse the prefix's ratios twice on the continuation."""
    loss = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode", default="soup")
    if settings.continuation_weight != "none" and RATIOS[settings.ratio].splices and loss in OVER_TOKENS:
        why = (
            f"actor.policy_loss.loss_mode={loss} weighs later tokens by the prefix's ratios already; use none, or soup"
        )
        raise refuse("algorithm.soup.continuation_weight", settings.continuation_weight, f"{why} as loss_mode.")
    level = OmegaConf.select(config, "algorithm.rollout_correction.rollout_is", default=None)
    if settings.continuation_weight != "none" and settings.ratio == "decoupled" and level == "sequence":
        why = "algorithm.rollout_correction.rollout_is=sequence weighs every token by the prefix's ratios already"
        raise refuse("algorithm.soup.continuation_weight", settings.continuation_weight, f"{why}; use none, or token.")


def _check_bypass(settings: SoupSettings) -> None:
    for key, value, needs in (
        ("ratio", settings.ratio, not RATIOS[settings.ratio].splices),
        ("prefix_gradient", settings.prefix_gradient, 0 < settings.prefix_gradient < 1),
        ("second_moment", settings.second_moment, settings.second_moment is not None),
        ("continuation_weight", settings.continuation_weight, settings.continuation_weight != "none"),
        ("stale_negatives.low", settings.stale_negatives.low, settings.stale_negatives.low is not None),
        ("stale_negatives.high", settings.stale_negatives.high, settings.stale_negatives.high is not None),
        ("behavior_log_probs", settings.behavior_log_probs, settings.behavior_log_probs == "trainer"),
        ("steering.cut", settings.steering.cut, settings.selection == "steered" and settings.steering.cut == "entropy"),
    ):
        if needs:
            why = "needs the trainer's forward pass, which algorithm.rollout_correction.bypass_mode=true saves."
            raise refuse(f"algorithm.soup.{key}", value, f"{why[:-1]}; set that to false.")


def check_partial_rollouts(settings: SoupSettings) -> None:
    """Refuse settings for historical prefixes that would also change interrupted responses.

    Raises:
        SystemExit: key, value, and which trainer to use.
    """
    for key, value, fits in (
        ("ratio", settings.ratio, settings.ratio in ("behavior", "decoupled")),
        ("prefix_gradient", settings.prefix_gradient, settings.prefix_gradient == 1),
        ("second_moment", settings.second_moment, settings.second_moment is None),
        ("continuation_weight", settings.continuation_weight, settings.continuation_weight == "none"),
        ("stale_negatives.low", settings.stale_negatives.low, settings.stale_negatives.low is None),
        ("stale_negatives.high", settings.stale_negatives.high, settings.stale_negatives.high is None),
        ("baseline", settings.baseline, settings.baseline == "group"),
        ("behavior_log_probs", settings.behavior_log_probs, settings.behavior_log_probs != "trainer"),
        ("selection", settings.selection, settings.selection != "steered"),
    ):
        if not fits:
            why = "would also change interrupted responses of the current policy; use trainer.v1.trainer_mode=soup."
            raise refuse(f"algorithm.soup.{key}", value, why)
