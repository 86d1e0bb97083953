"""The dump of training samples: the file that verl writes with our columns in it, and a step that does not wait."""

import contextlib
import json
import threading
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_worker import COUNTDOWN, RECORDED, STEP, Store, make_trainer, recorded
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.records.json_lines import read_json_lines
from recipe.soup.records.marks import marked
from recipe.soup.verl_adapter import trainer as trainer_module
from recipe.soup.verl_adapter.trainer import SoupTrainer
from verl_ext.health import ENDED

PATIENCE = 20.0  # seconds


def trained(store: Store, rows: slice = slice(None)) -> KVBatchMeta:
    """The recorded samples as they stand in TransferQueue after an update."""
    batch = recorded(store, rows)
    lines = {line["uid"]: line for line in read_json_lines(RECORDED)}
    for i, (key, row) in enumerate(store.rows.items()):
        length = len(row["responses"])
        row["old_log_probs"] = torch.tensor(lines[key]["old_log_probs"])
        row["prefix_mask"] = (row["policy_versions"] < STEP - 1).long()
        row["advantages"] = torch.linspace(-1, i / 3, length)
        row["reward_model"] = {"ground_truth": {"numbers": [3, 5], "target": i}, "style": "rule"}
    return batch


@pytest.fixture
def ours(composed: Any) -> Any:
    return make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"))


def written(trainer: Any, batch: KVBatchMeta, folder: Path) -> str:
    trainer._log_rollout_data(batch, {}, str(folder))
    trainer._shutdown_dump_executor()
    return (folder / f"{STEP}.jsonl").read_text()


def test_the_file_is_verls_with_our_columns_to_the_last_digit(
    composed: Any, ours: Any, store: Store, tmp_path: Path
) -> None:
    batch = trained(store)
    verls = make_trainer(PPOTrainerSync, composed(*COUNTDOWN, "algorithm=grpo"))
    verls._init_dump_executor()
    theirs = [json.loads(line) for line in written(verls, batch, tmp_path / "verl").splitlines()]
    assert len(theirs) == 64
    expected = []
    for row in theirs:
        held = store.rows[row["uid"]]
        response, prefix, advantages = (held[name].tolist() for name in ("responses", "prefix_mask", "advantages"))
        columns = {
            "prompt_ids": held["prompts"].tolist(),
            "response_ids": response,
            "response_mask": [1] * len(response),
            "marked": marked(verls.tokenizer, response, prefix, [True] * len(response)),
            "prefix_length": sum(prefix),
            "demonstration_length": 0,
            "policy_versions": held["policy_versions"].tolist(),
            "old_log_probs": held["old_log_probs"].tolist(),
            "advantage": advantages[-1],
            "prefix_advantage": advantages[0],
        }
        expected.append(json.dumps(row | columns, ensure_ascii=False))
    assert written(ours, batch, tmp_path / "ours").splitlines() == expected


def test_what_tools_wrote_is_told_apart(ours: Any, store: Store, tmp_path: Path) -> None:
    """The advantage is that of the last token that was sampled, also where a sample ends with a tool's answer."""
    batch = trained(store, slice(0, 8))
    for row in store.rows.values():
        row["policy_versions"][[6, 7, -1]] = NOBODY
        row["prefix_mask"] = (row["policy_versions"] < STEP - 1).long() * (row["policy_versions"] != NOBODY)
    for line in map(json.loads, written(ours, batch, tmp_path).splitlines()):
        row = store.rows[line["uid"]]
        sampled = [version != NOBODY for version in line["policy_versions"]]
        assert line["response_mask"] == [int(mine) for mine in sampled]
        assert line["marked"] == marked(ours.tokenizer, line["response_ids"], row["prefix_mask"].tolist(), sampled)
        assert "⟪" in line["marked"]
        assert line["advantage"] == pytest.approx(float(row["advantages"][-2]))


def test_demonstrations_are_told_apart(ours: Any, store: Store, tmp_path: Path) -> None:
    """The first sample is one from end to end, and no token of it was sampled."""
    batch = trained(store, slice(0, 8))
    whole, *others = store.rows.values()
    whole["policy_versions"][:] = NOBODY
    for row in others:
        row["policy_versions"][:4] = NOBODY
        row["policy_versions"][4:] = STEP - 1
    for row in store.rows.values():
        row["prefix_mask"] = (row["policy_versions"] == NOBODY).long()
    for line in map(json.loads, written(ours, batch, tmp_path).splitlines()):
        row = store.rows[line["uid"]]
        length = int(row["prefix_mask"].sum())
        assert (line["prefix_length"], line["demonstration_length"]) == (0, length)
        assert length in (4, len(line["response_ids"]))
        assert line["response_mask"] == [0] * length + [1] * (len(line["response_ids"]) - length)
        shown, _, rest = line["marked"].partition("⦆")
        assert (shown[0], rest == "") == ("⦅", length == len(line["response_ids"]))
        assert line["advantage"] == pytest.approx(float(row["advantages"][-1]))


def test_whatever_a_reward_tells_is_written(ours: Any, tmp_path: Path) -> None:
    """verl's writer knows numbers, texts and arrays; and a told score would hide the rewards that told none."""
    odd: list[Any] = [{1}, np.array([{2}, None], dtype=object), {"a": (1, {3})}, np.ones(2), torch.ones(1), None, b"x"]
    told = {"odd": odd, "score": [None, 0.5, *[None] * 5]}
    rows = len(odd)
    ours._write_generations(["in"] * rows, ["out"] * rows, odd, [1.0] * rows, told, str(tmp_path), 3)
    written = [json.loads(line) for line in (tmp_path / "3.jsonl").read_text().splitlines()]
    expected = ["{1}", ["{2}", None], {"a": [1, "{3}"]}, [1, 1], [1], None, "b'x'"]
    assert [row["odd"] for row in written] == [row["gts"] for row in written] == expected
    assert [row["score"] for row in written] == [1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def hold_up(trainer: Any) -> threading.Event:
    """The writer waits in its first text until the event is set."""
    go_on, decode = threading.Event(), trainer._writers_tokenizer.decode

    def held_up(*args: Any, **kwargs: Any) -> str:
        assert go_on.wait(PATIENCE)
        return decode(*args, **kwargs)

    trainer._writers_tokenizer.decode = held_up
    return go_on


def test_the_step_waits_for_the_fetch_only(ours: Any, store: Store, tmp_path: Path) -> None:
    """The writer is held up in its first text; the samples are cleared from TransferQueue meanwhile."""
    batch, go_on = trained(store), hold_up(ours)
    ours.tokenizer.decode = lambda *args, **kwargs: pytest.fail("the trainer's thread made a text")
    ours._log_rollout_data(batch, {}, str(tmp_path))
    assert not ours._dump_futures[0].done()
    store.rows.clear()
    go_on.set()
    ours._shutdown_dump_executor()
    assert len(read_json_lines(tmp_path / f"{STEP}.jsonl")) == 64


def test_padding_rows_are_not_dumped(ours: Any, store: Store, tmp_path: Path) -> None:
    batch = upsample_batch_to_divisible_size(trained(store, slice(0, 7)), 4, eos_token_id=1)
    assert len(batch) == 8
    assert len(written(ours, batch, tmp_path).splitlines()) == 7


def test_a_cap_keeps_whole_groups_and_fetches_no_more(
    composed: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    get = store.get
    for override in ("algorithm=soup", "algorithm=grpo"):
        trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, override, "algorithm.soup.dump_rows=16"))
        batch = trained(store)
        monkeypatch.setattr(
            "transfer_queue.kv_batch_get", lambda keys, **kw: fetched.append(len(keys)) or get(keys, **kw)
        )
        rows = [json.loads(line) for line in written(trainer, batch, tmp_path / override).splitlines()]
        first = sorted({key.split("_")[0] for key in batch.keys})[:2]
        assert [row["uid"].rsplit("_", 2)[:2] for row in rows] == [[uid, str(i)] for uid in first for i in range(8)]
    assert fetched == [16, 16]


def test_no_sample_is_lost_when_the_run_ends_in_an_exception(
    ours: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray kills the trainer's process once it has raised."""
    batch = trained(store)
    decode, started = ours._writers_tokenizer.decode, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> str:
        started.wait(0.01)
        return decode(*args, **kwargs)

    def fit(self: Any, agent_loop_manager: Any) -> None:
        self._writers_tokenizer.decode = slow
        self._log_rollout_data(batch, {}, str(tmp_path))
        raise ValueError("the step after")

    monkeypatch.setattr(PPOTrainerSync, "fit", fit)
    monkeypatch.setattr(trainer_module, "handshake", lambda *args: None)
    monkeypatch.setattr(trainer_module, "transfer_queue_actors", lambda config: {})
    monkeypatch.setattr(trainer_module, "RolloutWatchdog", lambda *args: contextlib.nullcontext())
    ours.actor_rollout_wg = SimpleNamespace(workers=[])
    ours.llm_server_manager = SimpleNamespace(get_replicas=list)
    ours.reward_loop_manager = SimpleNamespace(reward_loop_workers=[])
    with pytest.raises(ValueError, match="the step after"):
        ours.fit(None)
    assert len(read_json_lines(tmp_path / f"{STEP}.jsonl")) == 64


def test_a_full_disk_is_told_at_once_and_ends_the_run(
    ours: Any, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = trained(store)
    (tmp_path / f"{STEP}.jsonl").symlink_to("/dev/full")  # has no room for anything
    go_on = hold_up(ours)  # or the first dump might see its own failure
    ours._log_rollout_data(batch, {}, str(tmp_path))
    go_on.set()
    wait(ours._dump_futures, PATIENCE)
    told = capsys.readouterr().err
    assert f"The samples of step {STEP} could not be written to {tmp_path}: OSError: [Errno 28]" in told
    assert "trainer.rollout_data_dir" in told
    assert ENDED in told
    with pytest.raises(RuntimeError, match=f"samples of step {STEP} could not be written"):
        ours._log_rollout_data(batch, {}, str(tmp_path))
