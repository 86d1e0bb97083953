"""The arithmetic of the benchmarks, and that their reports can be drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_worker import COUNTDOWN, make_trainer

from benchmarks.report import ratio, render
from benchmarks.scaling import MODELS, Cost, Gpu, Run
from benchmarks.step_cost import BLOCK_LENGTH, alternate, measure, pairs
from recipe.soup.prefixes.plan import PromptPlan
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.verl_adapter import prompt_stage
from recipe.soup.verl_adapter.trainer import SoupTrainer


def blocks(mixed_costs: float) -> dict[int, dict[str, float]]:
    """Seven blocks of seven steps; mixed ones cost so many times their neighbours, and edges are wild."""
    metrics = {0: {"val-core/countdown/acc/mean@16": 0.1}}
    for block in range(7):
        speed = 1.0 + block  # the machine gets slower all the time
        for place in range(7):
            edge = place < 2 or place == 6
            seconds = 100.0 if edge else speed * (mixed_costs if block % 2 else 1.0)
            metrics[block * 7 + place + 1] = {
                "timing_s/step": seconds,
                "timing_s/gen": 2 * seconds,
                "soup/train/prefix/tokens": 300.0 * (block % 2),
                "soup/train/mixed/samples": 64.0,
                "soup/train/continuation/tokens": 900.0,
                "soup/cost/seed_requests": 64.0,
                "soup/cost/seed_tokens": 350.0,
                "soup/train/mixed/without_continuation": 7.0,
                "soup/bank/bytes": 100.0 * place,
                "timing_s/snapshot": 0.25,
            }
    return metrics


def test_ratio_of_neighbouring_blocks_without_their_edges() -> None:
    metrics = blocks(1.2)
    counted = pairs(metrics, 7, "timing_s/step")
    assert counted == [pytest.approx((4.0, 4.8)), pytest.approx((6.0, 7.2))]  # the first two blocks are not
    assert ratio([list(pair) for pair in counted]) == pytest.approx((1.2, 1.2, 1.2))
    measured = measure(metrics, 7)
    assert set(measured["seconds"]) == {"step", "gen"}
    assert (measured["prefix_tokens"], measured["bank_bytes"], measured["snapshot_bytes"]) == (300.0, 600.0, 0.0)


def test_the_trainers_source_mixes_in_every_second_block(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer itself, as it makes its source: what the benchmark changes must be what the trainer calls."""
    monkeypatch.setenv(BLOCK_LENGTH, "2")
    monkeypatch.setattr(prompt_stage, "make_source", prompt_stage.make_source)  # put back in the end
    alternate(prompt_stage)
    config = composed(*COUNTDOWN, "algorithm=soup", "algorithm.soup.lag=1", "algorithm.soup.warm_start=fill")
    source, prompts = make_trainer(SoupTrainer, config).source, config.data.train_batch_size
    planned = [source.plan((step - 1) * prompts, 1).lengths for step in range(1, 9)]
    assert [bool(lengths) for lengths in planned] == [False, False, True, True] * 2
    prefix = Prefix(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((0, 2),))
    for step in range(1, 9):
        source.queue.append(Chunk(None, step, ["m"], [PromptPlan([2], 1)]))
        source.bank.put(step, 0, prefix)
    taken = [source.take(step)[1][0] for step in range(1, 9)]
    assert [bool(slots) for slots in taken[2:]] == [True, True, False, False, True, True]


def test_the_interval_holds_the_median_and_grows_with_the_noise() -> None:
    calm = ratio([[1.0, 1.0 + 0.01 * i] for i in range(6)])
    wild = ratio([[1.0, 1.0 + 0.1 * i] for i in range(6)])
    assert calm[1] <= calm[0] <= calm[2]
    assert wild[2] - wild[1] > 5 * (calm[2] - calm[1])


def test_a_report_of_all_sources(tmp_path: Path) -> None:
    for source, costs in (("lookahead", 1.03), ("replay", 0.97)):
        result = {"label": source, "command": "python -m x", "machine": "a laptop"}
        text = json.dumps({**result, **measure(blocks(costs), 7)})
        (tmp_path / f"step_cost_{source}.json").write_text(text)
    text = render(tmp_path)
    assert "| whole step | 5.000 | 1.030 | 1.030 to 1.030 |" in text
    assert "| generation | 10.000 | 0.970 | 0.970 to 0.970 |" in text
    assert "written in 0.250 s" in text
    assert (tmp_path / "step_cost.png").stat().st_size > 10_000
    assert (tmp_path / "step_cost.md").read_text().startswith("# What")


def test_the_model_of_scale_behaves() -> None:
    run, gpu = Run(), Gpu()
    for model in MODELS:
        small, large = Cost(model, 8, run, gpu), Cost(model, 512, run, gpu)
        assert large.step < small.step
        assert 0 < small.lookahead < 1e-3 * small.step
        assert small.prefixes < small.colocated
        assert small.standalone_gpus % small.tp == 0
        assert small.update > small.old_log_probs > 0
        assert small.step == pytest.approx(small.generation + small.old_log_probs + small.update)
        assert small.write < small.written  # what the trainer waits for is the smaller part
    assert run.prefix_tokens == 512 * 8 * 0.5 * 1024


def test_old_log_probs_have_the_share_of_a_step_that_was_published() -> None:
    """14 to 19 %, of 7B; on more GPUs the step is mostly waiting for the longest response here."""
    eight = next(model for model in MODELS if model.name == "8B")
    for gpus in (8, 32, 64):
        cost = Cost(eight, gpus, Run(), Gpu())
        assert 0.13 < cost.old_log_probs / cost.step < 0.20


def test_the_document_is_the_one_that_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import scaling

    monkeypatch.setattr("sys.argv", ["scaling", "--output", str(tmp_path / "scaling.md")])
    scaling.main()
    document = Path(__file__).parents[2] / "docs" / "scaling.md"
    assert (tmp_path / "scaling.md").read_text() == document.read_text()
