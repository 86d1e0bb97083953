"""Comparisons: what is run, what is left alone, and what the report says of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ray
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipe.soup.records.intervals import mean_interval, paired_interval
from recipe.soup.tools.cli import main
from recipe.soup.tools.compare import execute as execution
from recipe.soup.tools.compare import plots
from recipe.soup.tools.compare.execute import execute
from recipe.soup.tools.compare.one_run import Run, quoted
from recipe.soup.tools.compare.plots import curves
from recipe.soup.tools.compare.report import write_report
from recipe.soup.tools.compare.results import (
    Result,
    correct_samples,
    figures,
    generated_tokens,
    pass_curve,
    read_result,
)
from recipe.soup.tools.compare.run import read_logs
from recipe.soup.tools.compare.study import DRIVERS, Study, read_study
from recipe.soup.verl_adapter.compose import composed

PROBLEMS, TRIES = 6, 8
STUDY: dict[str, Any] = {
    "driver": "lab",
    "baseline": "grpo",
    "seeds": [0, 1],
    "common": ["example=countdown"],
    "runs": {"grpo": ["algorithm=grpo"], "soup": ["algorithm=soup"]},
}


def write_run(metrics: Path, validation: Path, correct: list[int]) -> None:
    """A run of three steps that ends with `correct` right samples of each problem."""
    metrics.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 0, "data": {"val-core/x/acc/mean@8": 0.1}}]
    for step in (1, 2, 3):
        data = {
            "timing_s/step": 2.0 * step,
            "soup/train/continuation/tokens": 100.0,
            "soup/cost/seed_tokens": 10.0,
            "soup/train/groups_with_signal": 0.5,
            "actor/entropy": 1.0 / step,
            "critic/score/mean": 0.1 * step,
        }
        lines.append({"step": step, "data": data})
    lines[-1]["data"]["val-core/x/acc/mean@8"] = sum(correct) / (PROBLEMS * TRIES)
    metrics.write_text("\n".join(map(json.dumps, lines)))
    validation.mkdir(parents=True, exist_ok=True)
    for step, hits in ((0, [0] * PROBLEMS), (3, correct)):
        rows = [
            {"input": f"problem {i}", "output": "", "score": float(n < hits[i])}
            for i in range(PROBLEMS)
            for n in range(TRIES)
        ]
        np.random.default_rng(0).shuffle(rows)  # pyright: ignore[reportArgumentType]
        (validation / f"{step}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


# ---------------------------------------------------------------- the study


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"driver": "trl"}, ["driver=trl", "lab, main_ppo"]),
        ({"baseline": "ppo"}, ["baseline=ppo", "grpo, soup"]),
        ({"seeds": None}, ["`seeds` is missing"]),
        ({"seed": 1}, ["`seed` is not known"]),
        ({"first_seeds": {"ppo": 1}}, ["first_seeds=ppo", "grpo, soup"]),
        ({"runs": {"grpo": [], "lag=64": []}}, ["runs=lag=64", "letters"]),
        ({"runs": {"grpo": [], "..": []}}, ["runs=..", "begins with none of dot and dash"]),
        ({"runs": {"grpo": [], "Zoë": []}}, ["runs=Zoë", "without accents"]),
        ({"runs": {}}, ["runs={}", "a list of overrides"]),
        ({"runs": {"grpo": "algorithm=grpo"}}, ["runs=", "a list of overrides"]),
        ({"runs": {1: []}}, ["runs=", "a list of overrides"]),
        ({"common": 3}, ["common=3", "a list of overrides"]),
        ({"seeds": 3}, ["seeds=3", "different whole numbers"]),
        ({"seeds": [1, 1]}, ["seeds=[1, 1]", "different whole numbers"]),
        ({"seeds": []}, ["seeds=[]", "different whole numbers"]),
        ({"seeds": [0, True]}, ["seeds=[0, True]", "different whole numbers"]),
        ({"steps": [100, 100]}, ["steps=[100, 100]", "different whole numbers"]),
        ({"steps": "100"}, ["steps=100", "different whole numbers"]),
        ({"common": ["example=countdown", 3]}, ["common=['example=countdown', 3]", "a list of overrides"]),
        ({"baseline": 3}, ["baseline=3", "the name of a run"]),
        ({3: "x"}, ["`3` is not known", "first_seeds, steps"]),
        ({"first_seeds": [1]}, ["first_seeds=[1]", "a number for each name"]),
        ({"first_seeds": {"soup": "2"}}, ["first_seeds={'soup': '2'}", "a number for each name"]),
    ],
)
def test_a_wrong_study_is_refused_in_a_sentence(tmp_path: Path, change: dict, words: list[str]) -> None:
    content = {key: value for key, value in {**STUDY, **change}.items() if value is not None}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as refusal:
        read_study(path)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_study_may_choose_among_all_drivers() -> None:
    assert get_args(Study.model_fields["driver"].annotation) == tuple(DRIVERS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"runs: [", "is no YAML"),
        (b"- a\n- b\n", "has no keys"),
        (b"a: !!python/object/apply:os.getcwd []", "is no YAML"),  # nothing is run
        ("common: [é]".encode("latin-1"), "is no UTF-8 text"),
        ("common: [é]".encode("utf-16"), "is no UTF-8 text"),
    ],
)
def test_a_file_that_is_no_study(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(SystemExit, match=f"study.yaml: {words}"):
        read_study(tmp_path / "study.yaml")


def test_the_examples_are_studies(countdown_dir: Path) -> None:
    paths = [*(countdown_dir / "studies").glob("*.yaml"), *(countdown_dir.parent / "neighbours").glob("*.yaml")]
    assert paths
    for path in paths:
        assert read_study(path).seeds


def test_twins_differ_in_their_own_overrides_only(study_file: Path, tmp_path: Path) -> None:
    runs = {(run.name, run.seed): run for run in read_study(study_file).in_folder(tmp_path)}
    assert len(runs) == 4
    assert len({run.folder for run in runs.values()}) == 4
    one, other = (runs[name, 1] for name in ("grpo", "soup"))
    same = [str(a).replace("grpo", "soup") == str(b) for a, b in zip(one.overrides, other.overrides, strict=True)]
    assert all(same)
    assert "data.seed=1" in one.overrides


def test_only_some_and_the_baseline(tmp_path: Path) -> None:
    study = Study(**{**STUDY, "runs": {**STUDY["runs"], "other": []}, "seeds": [1]})
    assert [run.name for run in study.only(["other"]).in_folder(tmp_path)] == ["grpo", "other"]
    with pytest.raises(SystemExit, match="--only=ppo: is none of the runs grpo, soup, other"):
        study.only(["ppo"])


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(lambda s: f"/{s}"))
@example("/it's")
@example("/a b, c")
@example("/ends with \\")
@example("/\\'")
def test_hydra_reads_any_folder_back(folder: str) -> None:
    assume("${" not in folder)  # refused before
    parsed = OverridesParser.create().parse_override(f"key={quoted(Path(folder))}")
    assert OmegaConf.create({"key": parsed.value()}).key == str(Path(folder))


def test_a_study_in_any_folder_is_known_again(study_file: Path, tmp_path: Path, driver: Path) -> None:
    for name in ("it's", "a, b"):
        (tmp_path / name).mkdir()
    study = read_study(study_file)
    execute(study, tmp_path / "it's" / "out", jobs=2, records=tmp_path / "a, b")
    execute(study, tmp_path / "elsewhere", jobs=2, records=tmp_path / "a, b")
    (tmp_path / "it's" / "out").rename(tmp_path / "moved")
    execute(study, tmp_path / "moved", jobs=2)
    assert len(driver.read_text().split()) == 4
    [run, *_] = study.in_folder(tmp_path / "it's" / "out")
    config = composed(run.overrides)
    assert config.trainer.default_local_dir == f"{tmp_path}/it's/out/grpo/seed_0/checkpoints"


def test_a_folder_that_hydra_would_look_up_is_refused(study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Hydra would take the"):
        main(["compare", str(study_file), "--out", str(tmp_path / "${x}")])


def test_some_run_with_fewer_seeds(tmp_path: Path) -> None:
    study = Study(**{**STUDY, "seeds": [7, 8, 9], "first_seeds": {"soup": 2}})
    runs = [(run.name, run.seed) for run in study.in_folder(tmp_path)]
    assert runs == [("grpo", 7), ("soup", 7), ("grpo", 8), ("soup", 8), ("grpo", 9)]


# ---------------------------------------------------------------- running


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In place of the lab, a script that counts its starts and fails where a file says so."""
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, sys, pathlib\n"
        "metrics = pathlib.Path(os.environ['VERL_FILE_LOGGER_PATH'])\n"
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "starts.open('a').write(metrics.parent.parent.name + metrics.parent.name + '\\n')\n"
        f"if pathlib.Path({str(tmp_path / 'fail')!r}).exists() and 'algorithm=soup' in sys.argv:\n"
        "    sys.exit('no such luck')\n"
        'metrics.write_text(\'{"step": 0, "data": {}}\')\n'
    )
    monkeypatch.setattr(execution, "command", lambda run, driver: [sys.executable, str(script), *run.overrides])
    return tmp_path / "starts"


def test_what_failed_is_tried_again_and_what_is_done_is_not(study_file: Path, tmp_path: Path, driver: Path) -> None:
    study, out = read_study(study_file), tmp_path / "out"
    (tmp_path / "fail").touch()
    failed = execute(study, out, jobs=2)
    assert {(run.name, run.seed) for run in failed} == {("soup", 0), ("soup", 1)}
    (tmp_path / "fail").unlink()
    assert execute(study, out, jobs=2) == []
    assert execute(study, out, jobs=2) == []
    starts = driver.read_text().split()
    assert sorted(starts) == sorted(["grposeed_0", "grposeed_1", *["soupseed_0", "soupseed_1"] * 2])
    assert all(run.metrics.exists() and (run.folder / "command.txt").exists() for run in study.in_folder(out))


def test_on_a_ray_cluster(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of this process: Ray's workers start the runs, and failures come back."""
    monkeypatch.chdir(tmp_path)

    def scripted(run: Run, driver: str) -> Any:
        run.folder.mkdir(parents=True, exist_ok=True)
        name = (run.folder / "log.txt").relative_to(Path.cwd())  # tells where the task runs
        script = f"import sys; [open(path, 'w').write('ran') for path in ({str(name)!r}, {str(run.metrics)!r})]"
        script += f"; sys.exit({run.seed})"
        return subprocess.Popen([sys.executable, "-c", script])

    monkeypatch.setattr(execution, "start", scripted)
    study = read_study(study_file)
    with ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False):
        monkeypatch.setattr(ray, "init", lambda *_, **__: None)
        failed = execute(study, tmp_path / "out", jobs=4, ray_address="auto")
    assert [run.seed for run in failed] == [1, 1]
    assert [run.is_done for run in study.in_folder(tmp_path / "out")] == [True, True, False, False]
    assert all((run.folder / "log.txt").read_text() == "ran" for run in study.in_folder(tmp_path / "out"))


def test_a_node_without_the_folder_fails_its_run_only(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nothing is written where the study looks: no log to quote, no metrics."""
    monkeypatch.setattr(execution, "start", lambda run, driver: subprocess.Popen([sys.executable, "-c", ""]))
    failed = execute(read_study(study_file), tmp_path / "out", jobs=2)
    assert len(failed) == 4
    assert "grpo seed 0 failed: it left nothing in" in capsys.readouterr().out


def test_the_real_path_uses_a_cluster_by_itself(tmp_path: Path) -> None:
    study = Study(**{**STUDY, "driver": "main_ppo"})
    with pytest.raises(SystemExit, match="--ray=auto: runs of main_ppo use a cluster themselves"):
        execute(study, tmp_path, jobs=1, ray_address="auto")


def test_a_finished_run_with_other_settings_is_neither_used_nor_deleted(
    study_file: Path, tmp_path: Path, driver: Path
) -> None:
    execute(read_study(study_file), tmp_path / "out", jobs=2)
    changed = Study(**{**STUDY, "common": [*STUDY["common"], "trainer.total_training_steps=9"]})
    assert not any(run.is_done for run in changed.in_folder(tmp_path / "out"))
    with pytest.raises(SystemExit, match=r"grpo/seed_0 has a run with other settings; move it away"):
        execute(changed, tmp_path / "out", jobs=2)
    assert len(driver.read_text().split()) == 4
    assert all(run.metrics.exists() for run in changed.in_folder(tmp_path / "out"))


def test_a_study_may_be_moved(study_file: Path, tmp_path: Path, driver: Path) -> None:
    execute(read_study(study_file), tmp_path / "out", jobs=2)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    execute(read_study(study_file), tmp_path / "elsewhere", jobs=2)
    assert len(driver.read_text().split()) == 4


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs_is_refused(jobs: int, study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"--jobs={jobs}: at least one"):
        execute(read_study(study_file), tmp_path, jobs)


def test_no_cluster_is_a_sentence(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore of it.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SystemExit, match=r"--ray=auto: Could not find .* Leave --ray out"):
        execute(read_study(study_file), tmp_path, jobs=1, ray_address="auto")


def test_the_reason_of_a_failure_is_not_hydras_advice(tmp_path: Path) -> None:
    [run, *_] = Study(**STUDY).in_folder(tmp_path)
    run.folder.mkdir(parents=True)
    advice = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."
    (run.folder / "log.txt").write_text(f"ValueError: the reason\n\n{advice}\n")
    assert execution._reason(run, None).startswith("ValueError: the reason (see")


def test_the_real_path_runs_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # verl's TransferQueue is one per cluster
    with pytest.raises(SystemExit, match="--jobs=2: on the real path"):
        execute(Study(**{**STUDY, "driver": "main_ppo"}), tmp_path, jobs=2)


def test_a_run_that_was_killed_starts_anew(study_file: Path, tmp_path: Path, driver: Path) -> None:
    study = read_study(study_file)
    half = study.in_folder(tmp_path / "out")[0].folder
    half.mkdir(parents=True)
    (half / "leftover").touch()
    assert execute(study, tmp_path / "out", jobs=1) == []
    assert not (half / "leftover").exists()


# ---------------------------------------------------------------- numbers


def test_correct_samples_are_counted_by_problem_whatever_their_order(tmp_path: Path) -> None:
    write_run(tmp_path / "m.jsonl", tmp_path / "v", [0, 1, 2, 3, 8, 8])
    counts = correct_samples(tmp_path / "v" / "3.jsonl")
    assert counts == {f"problem {i}": (hits, TRIES) for i, hits in enumerate([0, 1, 2, 3, 8, 8])}


def test_figures_are_those_of_the_logs(tmp_path: Path) -> None:
    write_run(tmp_path / "m.jsonl", tmp_path / "v", [0, 1, 2, 3, 8, 8])
    row = figures(read_result("soup", 0, tmp_path / "m.jsonl", tmp_path / "v"))
    assert row["pass@1"] == pytest.approx(22 / 48)
    assert row["pass@8"] == pytest.approx(5 / 6)
    assert row["tokens generated"] == 330
    assert row["seconds a step"] == 4
    assert row["training entropy"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert "entropy" not in row  # of validation, which this run did not measure
    assert pass_curve({"a": (4, 8)})[2] == pytest.approx(1 - (4 * 3) / (8 * 7))


def test_dumps_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path / "m.jsonl", tmp_path / "v", [1] * PROBLEMS)
    (tmp_path / "v" / "3.jsonl").rename(tmp_path / "v" / "9.jsonl")  # of one that went on to step 9
    write_run(tmp_path / "m.jsonl", tmp_path / "v", [2] * PROBLEMS)
    assert set(read_result("soup", 0, tmp_path / "m.jsonl", tmp_path / "v").after.values()) == {(2, TRIES)}


def test_tokens_of_a_run_without_our_metrics() -> None:
    lengths = {"prompt_length/mean": 9.0, "response_length/mean": 11.0, "perf/total_num_tokens": 20.0 * 64}
    assert generated_tokens(Result("verl", 0, {1: lengths, 2: lengths}, {})).tolist() == [704, 704]


def test_tokens_that_were_accepted_were_not_generated_and_those_of_evicted_groups_were() -> None:
    names = ("train/continuation/tokens", "cost/seed_tokens", "cost/evicted_tokens", "verified/accepted")
    step = dict(zip((f"soup/{name}" for name in names), (100.0, 7.0, 30.0, 60.0), strict=True))
    assert generated_tokens(Result("verified", 0, {1: step, 2: step}, {})).tolist() == [77, 77]


def test_an_interval_covers_its_mean_and_shrinks_with_more_problems() -> None:
    rng = np.random.default_rng(3)
    widths = []
    for problems in (20, 2000):
        mean, low, high = mean_interval([rng.random(problems) for _ in range(5)])
        assert low < mean < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert mean_interval([np.full(7, 0.25)] * 3) == (0.25, 0.25, 0.25)


def test_intervals_are_right_about_as_often_as_they_say() -> None:
    """Runs share their problems, whose difficulty differs; a bound that fails once in thousands of cases."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        difficulty = rng.beta(0.3, 0.9, size=128)
        _, low, high = mean_interval([rng.binomial(16, difficulty) / 16 for _ in range(3)])
        hits += low < 0.25 < high
    assert hits >= 49


def test_pairing_takes_out_what_the_seeds_share() -> None:
    rng = np.random.default_rng(0)
    twins = [rng.random(50) for _ in range(4)]
    mean, low, high = paired_interval([twin + 0.1 for twin in twins], twins)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))


# ---------------------------------------------------------------- the report


def test_the_report_has_a_row_for_each_configuration_and_opens_from_disk(tmp_path: Path) -> None:
    results = {}
    for name, correct in (("grpo", [0, 1, 2, 3, 4, 5]), ("soup", [1, 2, 3, 4, 5, 6])):
        results[name] = []
        for seed in (0, 1):
            folder = tmp_path / name / str(seed)
            write_run(folder / "m.jsonl", folder / "v", correct)
            results[name].append(read_result(name, seed, folder / "m.jsonl", folder / "v"))
    files = write_report(results, "grpo", {"grpo": "a", "soup": "b"}, tmp_path / "report")
    assert all(path.stat().st_size > 0 for path in files)
    markdown, page = (tmp_path / "report" / "report.md").read_text(), (tmp_path / "report" / "report.html").read_text()
    assert "| soup | 2 | 6 | +0.125 (+0.125 to +0.125)" in markdown  # one of eight samples more, on every problem
    assert "| grpo | 2 | 6 | 0.312" in markdown
    assert "| pass@8 | training groups with signal |" in markdown
    assert "+0.000 (+0.000 to +0.000) |\n" in markdown  # groups with a signal, the same in both
    assert "pass@16" not in markdown.split("Minus")[1].splitlines()[2]
    assert "0.312" in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_the_logs_of_any_run_of_verl_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("grpo", "soup"):
        write_run(tmp_path / f"{name}.jsonl", tmp_path / name / "validation", [0, 1, 2, 3, 4, 5])
    logs = [str(tmp_path / f"{name}.jsonl") for name in ("grpo", "soup")]
    monkeypatch.setattr(sys, "argv", ["soup", "compare", "--from-logs", *logs, "--out", str(tmp_path / "out")])
    main()
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out
    assert "| soup | 1 | 6 | +0.000" in (tmp_path / "out" / "report.md").read_text()


def test_logs_of_several_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    for name in ("grpo", "soup"):
        for seed in (0, 1):
            log = tmp_path / f"lr=1e-4/{name}{seed}.jsonl"  # as Hydra names the folders of a sweep
            write_run(log, log.with_suffix("") / "validation", [seed + (name == "soup")] * PROBLEMS)
            given.append(f"{name}={log}")
    monkeypatch.setattr(sys, "argv", ["soup", "compare", "--from-logs", *given, "--out", str(tmp_path / "out")])
    main()
    assert "| soup | 2 | 6 | +0.125 (+0.125 to +0.125)" in (tmp_path / "out" / "report.md").read_text()


def test_logs_with_equal_names(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "lr=1" / "one.jsonl" for folder in ("a", "b")]
    for path in paths:
        write_run(path, path.parent / "v", [1] * PROBLEMS)
    with pytest.raises(SystemExit, match="two logs have the same name"):
        read_logs([str(path) for path in paths])
    assert read_logs([str(paths[0])]) == {"one": [paths[0]]}


def test_a_study_without_its_baseline_says_so(
    study_file: Path, tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {**STUDY, "baseline": "soup"}
    study_file.write_text(yaml.safe_dump(content))
    (tmp_path / "fail").touch()
    monkeypatch.setattr(sys, "argv", ["soup", "compare", str(study_file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="No run of soup came to its end"):
        main()


def test_study_is_plain_data() -> None:
    assert Study(**STUDY).runs["soup"] == ["algorithm=soup"]


def test_curves_go_forward_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds whose steps have prefixes from another step on, and one of which has none in step 4."""
    runs = [Result("soup", seed, {}, {}) for seed in (0, 1)]
    for run, first in zip(runs, (5, 2), strict=True):
        for step in range(1, 9):
            has = float(step >= first and step != 4)
            run.metrics[step] = {f"soup/loss/prefix/{name}": has for name in ("tokens", "ratio", "clip_fraction/low")}
    drawn: list[list[float]] = []
    ratios: list[float] = []
    close = plots.plt.close

    def keep(figure: Any) -> None:
        drawn.extend(list(line.get_xdata()) for axis in figure.axes for line in axis.lines)
        ratios.extend(y for axis in figure.axes if "ratio" in axis.get_title() for y in axis.lines[0].get_ydata())
        close(figure)

    monkeypatch.setattr(plots.plt, "close", keep)
    curves({"soup": runs}, tmp_path / "curves.png")
    assert [2, 3, 5, 6, 7, 8] in drawn
    assert ratios == [1.0] * 6  # no zeros of steps without a prefix among them
    assert all(steps == sorted(steps) for steps in drawn)
