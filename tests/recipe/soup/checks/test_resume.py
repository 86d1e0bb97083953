"""Before anything starts: a checkpoint whose prefixes this run can use, can use in part, or cannot use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from refusals import changing, sentence

from recipe.soup.bank_origin import NOTHING, SOURCE, TOKENIZER, TOOLS, bank_origin
from recipe.soup.checks.config import check_config
from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.resume import IN_ORDER, REFUSED, changes
from recipe.soup.prefixes.source import BANK_FILE
from recipe.soup.prefixes.steering import Steering
from recipe.soup.prefixes.verification import save_beside
from recipe.soup.settings.demonstrations import DemonstrationSettings
from recipe.soup.settings.prefixes import PrefixSettings
from recipe.soup.settings.steering import SteeringSettings

ROOT = Path(__file__).resolve().parents[4]
Compose = Callable[..., DictConfig]
ROLLOUT = "actor_rollout_ref.rollout"
SOUP = "algorithm.soup"
REPLAY = f"{SOUP}.source=replay"
CALCULATOR = ROOT / "examples/countdown/calculator.py"
WITH_TOOLS = " ".join(
    f"{ROLLOUT}.multi_turn.{key}" for key in ("enable=true", "format=countdown", f"function_tool_path={CALCULATOR}")
)


@pytest.fixture(scope="module")
def example(composed: Compose) -> Compose:
    return changing(composed("algorithm=soup", "hardware=cpu", "example=countdown"))


@pytest.fixture(params=["auto", "resume_path"])
def resuming(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Overrides of a run that goes on from `tmp_path`."""
    (tmp_path / "global_step_4" / "actor").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    where = [f"trainer.default_local_dir={tmp_path}", f"trainer.resume_from_path={tmp_path}/global_step_4"]
    return [f"trainer.resume_mode={request.param}", *where]


def leave(tmp_path: Path, config: DictConfig) -> None:
    PrefixBank().save(tmp_path / "global_step_4" / BANK_FILE, bank_origin(config), 64, {})


@pytest.mark.parametrize(
    ("then", "now", "key"),
    [
        ("", f"{SOUP}.source=replay", f"{SOUP}.source=replay"),
        (REPLAY, f"{REPLAY} {SOUP}.selection=failed", f"{SOUP}.selection=failed"),
        (REPLAY, f"{REPLAY} {SOUP}.selection=steered", f"{SOUP}.selection=steered"),
        ("", f"{SOUP}.on_eos=cut", f"{SOUP}.on_eos=cut"),
        ("", f"{ROLLOUT}.temperature=0.7", f"{ROLLOUT}.temperature=0.7"),
        ("", "data.train_batch_size=32", "data.train_batch_size=32"),
        ("", "data.seed=7", "data.seed=7"),
        ("", "data.shuffle=false", "data.shuffle=False"),
        (REPLAY, f"{REPLAY} {SOUP}.prefix_length.distribution=whole", f"{SOUP}.prefix_length.distribution=whole"),
        ("", WITH_TOOLS, f"{ROLLOUT}.agent.default_agent_loop=soup_tool_agent"),
        (WITH_TOOLS, f"{WITH_TOOLS} {ROLLOUT}.multi_turn.format=hermes", f"{ROLLOUT}.multi_turn.format=hermes"),
    ],
)
def test_refused(example: Compose, resuming: list[str], tmp_path: Path, then: str, now: str, key: str) -> None:
    leave(tmp_path, example(*then.split()))
    config = example(*resuming, *now.split())
    said = sentence(check_config, config)
    assert said.startswith(f"{key}: the prefixes in {tmp_path / 'global_step_4'} were made with ")
    before = str(of(example(*then.split()))[key.partition("=")[0].removeprefix(f"{SOUP}.")])
    assert said.endswith(f"; go on with {before}, or set {SOUP}.resume_bank=fresh to begin without them.")
    check_config(example(*resuming, *then.split()))
    check_config(example(*resuming, *now.split(), f"{SOUP}.resume_bank=fresh"))
    check_config(example(*resuming[1:], *now.split(), "trainer.resume_mode=disable"))


@pytest.mark.parametrize(
    "now",
    [
        "",
        f"{SOUP}.lag=2",
        f"{SOUP}.lag=200 {SOUP}.lag_distribution=uniform",
        f"{SOUP}.mixed_share=0.25",
        f"{SOUP}.samples_per_prefix=2",
        f"{SOUP}.prefix_length.max=3",
        f"{SOUP}.prefix_length.unit=fraction {SOUP}.prefix_length.min=0.1 {SOUP}.prefix_length.max=0.5",
        f"{SOUP}.schedules.lag.shape=linear {SOUP}.schedules.lag.end=3",
        f"{SOUP}.warm_start=pure",
        f"{SOUP}.behavior_log_probs=trainer",
        f"{SOUP}.ratio=decoupled",
        f"{ROLLOUT}.n=4",
        "data.max_response_length=20",
        "trainer.total_training_steps=200",
    ],
)
def test_accepted(example: Compose, resuming: list[str], tmp_path: Path, now: str) -> None:
    leave(tmp_path, example())
    check_config(example(*resuming, *now.split()))


def test_without_a_bank(example: Compose, resuming: list[str]) -> None:
    said = sentence(check_config, example(*resuming))
    assert BANK_FILE in said
    assert f"{SOUP}.resume_bank=fresh" in said
    check_config(example(*resuming, f"{SOUP}.resume_bank=fresh"))
    check_config(example(*resuming, f"{SOUP}.mixed_share=0"))  # nothing is lost


def test_a_torn_one(example: Compose, resuming: list[str], tmp_path: Path) -> None:
    (tmp_path / "global_step_4" / BANK_FILE).write_bytes(b"PK\x03\x04")
    assert f"{BANK_FILE} is torn" in sentence(check_config, example(*resuming))


def test_controllers_are_not_lost_in_a_resume(example: Compose, resuming: list[str], tmp_path: Path) -> None:
    config = example(*resuming, REPLAY, f"{SOUP}.selection=steered")
    leave(tmp_path, config)
    assert "the controllers of selection=steered are lost" in sentence(check_config, config)
    Steering(SteeringSettings()).save(tmp_path / "global_step_4")
    check_config(config)


def test_a_run_that_verifies_needs_the_prompts_of_its_responses(
    example: Compose, resuming: list[str], tmp_path: Path
) -> None:
    config = example(*resuming, REPLAY, f"{SOUP}.selection=verified")
    leave(tmp_path, config)
    assert "the prompts of its responses are lost" in sentence(check_config, config)
    save_beside(tmp_path / "global_step_4", {})
    check_config(config)
    check_config(example(*resuming, REPLAY, f"{SOUP}.selection=verified", f"{SOUP}.verification.leniency=1"))
    assert "resume_bank=fresh" in sentence(check_config, example(*resuming, REPLAY))


def test_the_twin_may_become_anything(composed: Compose, example: Compose, resuming: list[str], tmp_path: Path) -> None:
    twin = composed("algorithm=grpo", "hardware=cpu", "example=countdown")
    assert bank_origin(twin) == {SOURCE: NOTHING}
    leave(tmp_path, twin)
    for now in ([], [REPLAY], [REPLAY, f"{SOUP}.selection=steered"], [f"{SOUP}.source=snapshot"], [f"{ROLLOUT}.n=4"]):
        check_config(example(*resuming, *now))


# ---------------------------------------------------------------- what is recorded


def of(config: DictConfig) -> dict[str, Any]:
    return {key.removeprefix(f"{SOUP}."): value for key, value in bank_origin(config).items()}


def test_every_key_of_prefixes_is_recorded_where_it_has_an_effect(example: Compose) -> None:
    sources = [example(), example(REPLAY, f"{SOUP}.selection=steered"), example(f"{SOUP}.source=snapshot")]
    verified = example(REPLAY, f"{SOUP}.selection=verified")
    recorded = {key for config in (*sources, verified) for key in of(config)}
    without = {name for name, _ in PrefixSettings.every_key() if name not in recorded}
    engine = {"storage", "n_gpus", "gpu_memory_utilization", "max_num_seqs"}
    shown = {f"demonstrations.{key}" for key in DemonstrationSettings.model_fields}  # of which nothing is kept
    assert without == {"resume_bank", *(f"snapshot.{key}" for key in engine), *shown}
    assert "lag" in of(sources[0])
    assert "lag" not in of(sources[1])
    assert "snapshot.every" not in of(sources[0])
    assert "snapshot.placement" not in of(sources[0])
    placed = [
        of(example(f"{SOUP}.source=snapshot", f"{SOUP}.snapshot.placement={p}"))["snapshot.placement"]
        for p in ("colocated", "standalone", "shared")
    ]
    assert placed == ["colocated or standalone"] * 2 + ["shared"]  # the first two keep the same weights


def test_what_auto_means_is_recorded(example: Compose) -> None:
    assert of(example())["behavior_log_probs"] == "rollout"  # float32 in both
    assert of(example(f"{ROLLOUT}.dtype=bfloat16"))["behavior_log_probs"] == "trainer"


def test_a_null_is_what_it_means(example: Compose) -> None:
    free = example(f"{SOUP}.prefix_length.max=null")
    halved = example(f"{SOUP}.prefix_length.max=null", "data.max_response_length=12")
    changed = changes(bank_origin(free), bank_origin(halved))
    assert changed[f"{SOUP}.prefix_length.max"] == (12, 6)
    assert changed["data.max_response_length"] == (24, 12)


def test_files_that_have_moved_are_the_same_and_others_are_not(
    example: Compose, tmp_path: Path, countdown_dir: Path
) -> None:
    model, rows = tmp_path / "model", tmp_path / "train.parquet"
    rows.write_bytes((countdown_dir / "data/train.parquet").read_bytes())
    model.mkdir()
    for file in (countdown_dir / "base_model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    before = bank_origin(example())
    moved = example(f"data.train_files={rows}", f"actor_rollout_ref.model.path={model}")
    assert set(changes(before, bank_origin(moved))) == {"actor_rollout_ref.model.path"}
    rows.write_bytes(b"other")
    (model / "tokenizer.json").write_bytes(b"{}")
    assert set(changes(before, bank_origin(moved))) == {
        "actor_rollout_ref.model.path", "data.train_files", TOKENIZER,
    }  # fmt: skip
    moved.actor_rollout_ref.model.path = "somebody/on-the-hub"
    moved.data.train_files = "hdfs://elsewhere/train.parquet"
    assert set(changes(before, bank_origin(moved))) == {"actor_rollout_ref.model.path"}


def test_other_tools_and_another_template_are_noticed(example: Compose, tmp_path: Path, countdown_dir: Path) -> None:
    tools, model = tmp_path / "tools.py", tmp_path / "model"
    model.mkdir()
    settings = model / "tokenizer_config.json"
    run = example(
        *WITH_TOOLS.replace(str(CALCULATOR), str(tools)).split(), f"actor_rollout_ref.model.tokenizer_path={model}"
    )
    tools.write_text("one")
    settings.write_text('{"chat_template": "one", "transformers_version": "1"}')
    before = bank_origin(run)
    settings.write_text('{"chat_template": "one", "transformers_version": "2"}')
    assert changes(before, bank_origin(run)) == {}
    tools.write_text("two")
    assert set(changes(before, bank_origin(run))) == {TOOLS}
    settings.write_text('{"chat_template": "two", "transformers_version": "2"}')
    assert set(changes(before, bank_origin(run))) == {TOOLS, TOKENIZER}


def test_the_documents_say_what_each_key_does_in_a_resume(example: Compose) -> None:
    page = (ROOT / "docs" / "run.md").read_text()
    table = page[page.index("## Going on with other settings") :]
    refused, adapted = (
        set(row.split("|")[2].replace("`", "").replace(",", " ").split())
        for row in table.splitlines()
        if row.startswith(("| refused", "| fits"))
    )
    recorded = {
        key
        for config in (example(), example(REPLAY, f"{SOUP}.selection=steered"), example(f"{SOUP}.source=snapshot"))
        for key in of(config)
    }
    names = {name.removeprefix(f"{SOUP}.") for name in (*REFUSED, *IN_ORDER)}
    assert names <= refused
    for key in recorded - names:
        assert any(f"{key}.".startswith(f"{named}.") for named in adapted), key
