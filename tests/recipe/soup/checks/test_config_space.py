"""Whatever somebody writes, a config is checked and can start, or is refused in one sentence that names a key."""

import copy
import re
from collections.abc import Callable
from functools import cache

from compose import compose_config
from config_space import Overrides, changed, overrides
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from recipe.soup.bank_origin import bank_origin
from recipe.soup.checks.config import check_config
from recipe.soup.checks.loops import check_loops
from recipe.soup.checks.start import IN_ANY_DRIVER, check_start
from recipe.soup.lab.refusals import check_lab_config
from recipe.soup.prefixes.plan import plan_prompt
from recipe.soup.run_settings import run_settings, what_auto_means
from recipe.soup.verl_adapter.run_facts import run_facts

FEW = 200
EXAMPLES = max(FEW, settings.default.max_examples if settings.default is not None else 0)
"""`make nightly` loads a profile with more."""
SENTENCE = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*=.*: .*\.", re.IGNORECASE)
ROWS = 4096


def of_soup(config: DictConfig) -> None:
    """What runs before main_ppo, in the order of the callbacks."""
    check_start(config)
    check_config(config)
    what_auto_means(config)


def of_twin(config: DictConfig) -> None:
    check_start(config)
    run_settings(config)
    check_loops(config)


def of_lab(config: DictConfig) -> None:
    check_lab_config(config)
    for check in IN_ANY_DRIVER.values():
        check(config)
    check_config(config)


WAYS: dict[str, tuple[str, Callable[[DictConfig], None]]] = {
    "soup": ("soup", of_soup), "twin": ("grpo", of_twin), "lab": ("soup", of_lab),
}  # fmt: skip


def starts(config: DictConfig) -> None:
    """What a run does first with a config that was accepted: none of it may find something wrong."""
    settings_of_run, facts = run_settings(config), run_facts(config, ROWS, config.actor_rollout_ref.rollout.seed)
    bank_origin(config)
    for ordinal in (0, 17, 16 * 300):
        plan = plan_prompt(settings_of_run, facts, ordinal, 9.0)
        assert len(plan.lengths) * settings_of_run.samples_per_prefix <= facts.samples
        assert all(1 <= length <= facts.response_length for length in plan.lengths)


@cache
def base(algorithm: str) -> DictConfig:
    return copy.deepcopy(compose_config(f"algorithm={algorithm}", "hardware=cpu", "example=countdown"))


def asked(way: str, given: Overrides) -> str | None:
    """What a config is refused with, or None, after what a run that was accepted does first."""
    algorithm, check = WAYS[way]
    with changed(base(algorithm), given) as config:
        try:
            check(config)
        except SystemExit as refusal:
            return str(refusal.code)
        starts(config)
    return None


@settings(max_examples=EXAMPLES, derandomize=EXAMPLES == FEW, suppress_health_check=[HealthCheck.too_slow])
@given(way=st.sampled_from(sorted(WAYS)), given_keys=overrides())
def test_a_config_starts_or_is_refused_in_a_sentence_with_a_key(way: str, given_keys: Overrides) -> None:
    refusal = asked(way, given_keys)
    assert refusal is None or SENTENCE.fullmatch(refusal), refusal
