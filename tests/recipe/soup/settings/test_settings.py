"""The model of the settings, and that nothing else says it differently: YAML, registries, README."""

import copy
import pickle
import re
from functools import partial
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le
from omegaconf import DictConfig, OmegaConf
from ray.cloudpickle import cloudpickle

from recipe.soup.algorithm.baselines import BASELINES
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.settings import ScheduleSettings, SoupSettings, parse_settings
from recipe.soup.settings.group import text
from recipe.soup.settings.loss import CLIPPED
from recipe.soup.tools.settings_table import MARKED, README, table, with_tables

ROOT = "algorithm.soup"


def parse(content: str) -> SoupSettings:
    """Of a line of YAML, with responses of up to 24 tokens."""
    node = OmegaConf.create(content)
    assert isinstance(node, DictConfig)
    return parse_settings(node, 24)


def choices(name: str) -> tuple[str, ...]:
    return get_args(SoupSettings.model_fields[name].annotation)


def test_choices_are_what_the_registries_know() -> None:
    assert choices("ratio") == tuple(RATIOS)
    assert choices("baseline") == tuple(BASELINES)
    assert {name for name, ratio in RATIOS.items() if ratio.clips_prefix} == set(CLIPPED)


def test_yaml_names_every_key_with_the_models_default(composed: Any) -> None:
    assert OmegaConf.to_container(composed("algorithm=soup").algorithm.soup) == SoupSettings().model_dump()


def test_the_twins_yaml_differs_in_the_share_only(composed: Any) -> None:
    twin = OmegaConf.to_container(composed("algorithm=grpo").algorithm.soup)
    defaults = SoupSettings().model_dump()
    assert isinstance(twin, dict)
    assert {str(key): value for key, value in twin.items() if value != defaults[str(key)]} == {"mixed_share": 0.0}


def test_every_key_says_what_it_means_and_every_bound_what_to_do() -> None:
    for name, field in SoupSettings.every_key():
        assert field.description, name
        assert field.description.endswith("."), name
        assert text(field, "origin"), name
        assert bool(text(field, "advice")) == any(isinstance(bound, Ge | Gt | Le) for bound in field.metadata), name


def test_the_tables_in_the_readme_are_the_models() -> None:
    page = README.read_text()
    assert with_tables(page) == page, "run python -m recipe.soup.tools.settings_table"


def test_the_tables_in_the_readme_have_every_key_once() -> None:
    named = [name for _, names, _ in MARKED.findall(README.read_text()) for name in names.split()]
    assert sorted(named) == sorted(SoupSettings.model_fields)


def test_tables_by_hand_have_every_source_and_ratio() -> None:
    rows = re.findall(r"^\| `(\w+)`(?: \(default\))? \|", MARKED.sub("", README.read_text()), re.MULTILINE)
    assert {*choices("source"), *choices("ratio")} <= set(rows)


def test_a_table_of_a_key_that_there_is_not() -> None:
    with pytest.raises(KeyError, match="lagg"):
        table(["lag", "lagg"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lag: many", "lag=many: must be a whole number; see"),
        ("lag: 1.0", "lag=1.0: must be a whole number; see"),
        ("lag: true", "lag=True: must be a whole number; see"),
        ("lag: null", "lag=None: must be a whole number; see"),
        ("lag: [1]", "lag=[1]: must be a whole number; see"),
        ("dump_rows: 2.5", "dump_rows=2.5: must be a whole number; see"),
        ("mixed_share: half", "mixed_share=half: must be a number; see"),
        ("mixed_share: false", "mixed_share=False: must be a number; see"),
        ("mixed_share: .nan", "mixed_share=nan: a share lies between 0 and 1."),
        ("prefix_clip: {high: .nan}", "prefix_clip.high=nan: use 0 or more, inf for no clip."),
        ("source: null", "source=None: choose one of lookahead, snapshot, replay, dataset."),
        ("source: 3", "source=3: choose one of lookahead, snapshot, replay, dataset."),
        ("snapshot: {policy: null}", "snapshot.policy=None: must be a name or a path; see"),
        ("prefix_length: 3", "prefix_length=3: is a group of keys, not a value; see"),
        ("prefix_clip: null", "prefix_clip=None: is a group of keys, not a value; see"),
        ("schedules: {lag: {shap: linear}}", "schedules.lag.shap=linear: is no key; see"),
        ("schedules: {lag: {shape: linear, end: inf}}", "schedules.lag.end=inf: a lag counts updates; use 0 or more."),
        ("lag: ${nowhere}", "lag=?: Interpolation key 'nowhere' not found; see"),
        ("lag: ???", "lag=?: Missing mandatory value: lag; see"),
    ],
)
def test_wrong_types_and_keys(content: str, words: str) -> None:
    whole = OmegaConf.create({"algorithm": {"soup": OmegaConf.create(content)}})
    for node in (OmegaConf.create(content), whole.algorithm.soup):  # alone, and inside a run's config
        with pytest.raises(SystemExit) as refusal:
            parse_settings(node, 24)  # pyright: ignore[reportArgumentType]
        said = str(refusal.value)
        assert said.startswith(f"{ROOT}.{words}")
        assert said.endswith(".")
        assert "\n" not in said


def test_numbers_may_be_written_as_text_and_whole_ones_where_others_fit() -> None:
    assert parse("lag: '8'").lag == 8
    assert parse("prefix_clip: {low: inf}").prefix_clip.low == float("inf")
    share = parse("mixed_share: 1").mixed_share
    assert (share, type(share)) == (1.0, float)


def test_values_may_come_from_the_rest_of_the_config() -> None:
    config = OmegaConf.create({"steps": 7, "algorithm": {"soup": {"lag": "${steps}"}}})
    assert parse_settings(config.algorithm.soup, 24).lag == 7


def test_nothing_given_is_the_default_with_null_filled_in() -> None:
    settings, defaults = parse_settings(None, 24), SoupSettings()
    assert (settings.prefix_length.min, settings.prefix_length.max, settings.snapshot.keep) == (1, 12, 5)
    settings.prefix_length.min = settings.prefix_length.max = settings.snapshot.keep = None
    assert settings == defaults


def test_settings_are_changed_after_the_fact_and_alone() -> None:
    one, other = SoupSettings(), SoupSettings()
    one.behavior_log_probs = "trainer"
    one.schedules.lag = ScheduleSettings(warmup=3)
    one.snapshot.keep = 2
    assert other == SoupSettings()
    assert one != other


def test_settings_travel() -> None:
    settings = parse("{source: snapshot, prefix_clip: {low: inf}, snapshot: {policy: pool, keep: 3}}")
    settings.behavior_log_probs = "rollout"
    # As Ray does with what goes to workers; nothing is loaded that was not dumped in this line.
    for load, dump in ((pickle.loads, pickle.dumps), (cloudpickle.loads, cloudpickle.dumps)):
        assert load(dump(settings)) == settings
        called = load(dump(partial(SoupSettings.model_dump, settings)))
        assert called() == settings.model_dump()
    assert copy.deepcopy(settings) == settings
