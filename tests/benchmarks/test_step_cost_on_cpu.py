"""The arithmetic of the step-cost benchmark."""

import pytest

from benchmarks.step_cost import measure


def test_ratio_of_neighbouring_blocks_without_their_edges() -> None:
    """Mixed blocks cost 1.2 times their neighbour, whatever the machine's speed at that time; edges are wild."""
    metrics = {}
    for block in range(6):
        speed = 1.0 + block // 2  # the machine gets slower with every pair
        for place in range(5):
            edge = place in (0, 4)
            seconds = 100.0 if edge else speed * (1.2 if block % 2 else 1.0)
            metrics[block * 5 + place + 1] = {"timing_s/step": seconds, "timing_s/gen": 2 * seconds}
    metrics[0] = {"val-core/countdown/acc/mean@16": 0.1}
    ratios = measure(metrics, block_length=5)
    assert ratios["step"].tolist() == pytest.approx([1.2, 1.2])  # the first pair is not counted
    assert ratios["gen"].tolist() == pytest.approx([1.2, 1.2])
    assert "update_actor" not in ratios
