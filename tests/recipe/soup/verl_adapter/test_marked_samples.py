"""Training samples in trackers: the prefix stands in brackets, behind verl's validation samples."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_worker import COUNTDOWN, STEP, StillWorkers, Store, as_demonstrations, make_trainer, recorded
from verl.utils.tracking import ValidationGenerationsLogger

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.records.marks import marked
from recipe.soup.verl_adapter.marked_samples import NOTHING, MarkedGenerations, mixed_samples
from recipe.soup.verl_adapter.trainer import SoupTrainer


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ([True, True, False, False], "⟦ab⟧cd"),
        ([True] * 4, "⟦abcd⟧"),
        ([False] * 4, "abcd"),
        ([True, False, True, False], "⟦a⟧b⟦c⟧d"),
    ],
)
def test_brackets(prefix: list[bool], expected: str) -> None:
    letters = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join("abcd"[i] for i in ids))
    # The row is padded to the batch's width.
    assert marked(letters, [0, 1, 2, 3], [*prefix, False, False], [True] * 4 + [False] * 2) == expected


@pytest.mark.parametrize(
    ("prefix", "sampled", "expected"),
    [
        ([True, False, False, False], [True, True, False, True], "⟦a⟧b⟪c⟫d"),
        ([True, True, False, False], [True, True, False, True], "⟦ab⟧⟪c⟫d"),
        ([False] * 4, [True, False, False, False], "a⟪bcd⟫"),
    ],
)
def test_brackets_of_what_tools_wrote(prefix: list[bool], sampled: list[bool], expected: str) -> None:
    letters = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join("abcd"[i] for i in ids))
    assert marked(letters, [0, 1, 2, 3], [*prefix, False], [*sampled, False]) == expected


@pytest.mark.parametrize(
    ("prefix", "sampled", "expected"),
    [
        ([True, True, False, False], [False, False, True, True], "⦅ab⦆cd"),
        ([True] * 4, [False] * 4, "⦅abcd⦆"),
        ([True, True, False, False], [False, True, True, False], "⦅a⦆⟦b⟧c⟪d⟫"),
    ],
)
def test_brackets_of_demonstrations(prefix: list[bool], sampled: list[bool], expected: str) -> None:
    letters = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join("abcd"[i] for i in ids))
    assert marked(letters, [0, 1, 2, 3], [*prefix, False], [*sampled, False]) == expected


@pytest.mark.parametrize("whole", [True, False])
def test_trackers_tell_demonstrations_from_versions(whole: bool, composed: Any, store: Store) -> None:
    trainer: Any = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"), StillWorkers(store))
    batch = recorded(store)
    as_demonstrations(store)
    if whole:
        for row in store.rows.values():
            row["policy_versions"][:] = NOBODY
    trainer._compute_old_log_prob(batch, {})
    for prompt, text, _ in mixed_samples(batch, trainer.collected.rows, trainer.tokenizer, 5):
        assert prompt.startswith("(training, a demonstration)" if whole else f"(training, versions {STEP - 1})")
        assert text.startswith("⦅")
        assert whole <= text.endswith("⦆")  # what follows may be the end token alone


def test_no_response() -> None:
    assert marked(None, [], [False], [False]) == ""


def test_tensorboard_shows_the_step_s_mixed_samples(
    composed: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's own logger writes them; read back with TensorBoard's reader, and compared with the recorded rows."""
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    config = composed(
        *COUNTDOWN, "algorithm=soup", "trainer.log_val_generations=5", "trainer.logger=[console,tensorboard]"
    )
    trainer: Any = make_trainer(SoupTrainer, config, StillWorkers(store))
    trainer.validation_generations_logger = ValidationGenerationsLogger("project", "run")
    trainer._maybe_log_val_generations([f"q{i}" for i in range(9)], [f"a{i}" for i in range(9)], [1.0] * 9)  # step 0
    trainer._compute_old_log_prob(recorded(store), {})
    trainer._maybe_log_val_generations([f"q{i}" for i in range(9)], [f"a{i}" for i in range(9)], [1.0] * 9)
    cast(Any, trainer.validation_generations_logger)._logger.writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    text = events.Tensors("val/generations/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.count("### Sample") == 10
    assert text.count("(training, versions") == text.count("⟦") == 5
    expected = set()
    for row in store.rows.values():
        old = int((row["policy_versions"] < STEP - 1).sum())
        pieces = [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in
                  (row["responses"][:old], row["responses"][old:])]  # fmt: skip
        expected.add(f"⟦{pieces[0]}⟧{pieces[1]}")
    shown = [line.removeprefix("**Output:** ") for line in text.splitlines() if "⟦" in line]
    assert len(set(shown)) > 1
    assert set(shown) <= expected


def test_as_many_columns_at_every_step() -> None:
    """wandb's table has its columns from the first validation, before which nothing was trained on."""
    calls: list[Any] = []
    logger = SimpleNamespace(log=lambda loggers, samples, step: calls.append(samples))
    validation = [["q", "a", 1.0]] * 3
    MarkedGenerations(logger, []).log(["wandb"], validation, 0)
    again = MarkedGenerations(MarkedGenerations(logger, []), [["t", "⟦x⟧y", 0.0]])
    again.log(["wandb"], validation, 1)
    assert calls == [validation + [NOTHING] * 3, [*validation, ["t", "⟦x⟧y", 0.0], NOTHING, NOTHING]]
