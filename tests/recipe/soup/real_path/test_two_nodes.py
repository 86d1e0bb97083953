"""Two Ray nodes on one host: a training rank and a vLLM replica on each, past weights on the second."""

from pathlib import Path

import pytest
from ray_nodes import two_nodes
from real_run import STARTED, RealRun, assert_exact, versions_of_prefixes

from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

TWO = ("algorithm=soup", "algorithm.soup.lag=2", "algorithm.soup.warm_start=pure")
WORKERS = "actor_rollout_ref.rollout.agent.num_workers=2"


def test_a_run_over_two_nodes_is_exact(tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path) -> None:
    with two_nodes(tmp_path, clean_environ) as nodes:
        overrides = [*TWO, WORKERS, *nodes.overrides, "trainer.total_training_steps=5"]
        run = RealRun(tmp_path, nodes.environ, *overrides)
        assert run.finish(STARTED) == 0, run.log[-4000:]
    samples = read_samples(run.samples)
    versions = {step: versions_of_prefixes(rows) for step, rows in samples.items()}
    assert versions == {1: set(), 2: set(), 3: {0}, 4: {1}, 5: {2}}
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))


def test_past_weights_on_the_second_node_are_exact_and_its_death_is_told(
    tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    snapshot = ["algorithm.soup.source=snapshot", "algorithm.soup.snapshot.every=1"]
    snapshot += ["algorithm.soup.snapshot.placement=standalone", "trainer.total_training_steps=60"]
    with two_nodes(tmp_path, clean_environ) as nodes:
        run = RealRun(tmp_path, nodes.environ, *TWO, WORKERS, *nodes.overrides, *snapshot)
        run.wait_for(run.checkpoints / "global_step_6" / "actor" / "huggingface" / "config.json", STARTED)
        nodes.kill_second()
        assert run.finish(90) not in (0, None)
    assert "Ray lost the node" in run.terminal.splitlines()[-1]
    samples = read_samples(run.samples)
    assert all(versions_of_prefixes(rows) == ({step - 3} if step >= 3 else set()) for step, rows in samples.items())
    for path in run.samples.glob("*.jsonl"):  # of which the checkpoint is whole
        if int(path.stem) > 6:
            path.unlink()
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
