"""`soup-verl eval`: sample a model on datasets, grade the samples, and write their table."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from recipe.soup.checks.model import check_folder
from recipe.soup.errors import refuse
from recipe.soup.mathematics.datasets import DATASETS
from recipe.soup.records.problems import Problem
from recipe.soup.tools.evaluate.checkpoint import loadable, weights_fingerprint
from recipe.soup.tools.evaluate.grading import grade_missing
from recipe.soup.tools.evaluate.inputs import KEYS, check_arguments, config_of, read_data
from recipe.soup.tools.evaluate.samples import Row, add_problem, adopt_samples, open_samples, sampled
from recipe.soup.tools.evaluate.table import write_table
from recipe.soup.verl_adapter.grader import Grader
from recipe.soup.verl_adapter.problems import Prompts

EXAMPLES = """examples:
  soup-verl eval Qwen/Qwen3-1.7B math500 amc23 --samples 16
  soup-verl eval Qwen/Qwen3-1.7B math500 +data.apply_chat_template_kwargs.enable_thinking=false
  soup-verl eval runs/countdown/soup/checkpoints/global_step_80 examples/countdown/data/val.parquet \\
      --reward pkg://examples.countdown.reward --max-tokens 24
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl eval`."""
    add = parser.add_argument
    add("model", help="checkpoint of verl (global_step_N), Hugging Face folder, or name on the hub")
    names = f"{', '.join(DATASETS)}; or parquet, json or jsonl files in verl's columns"
    add("data", nargs="+", help=f"{names}. And key=value, for {', '.join(f'{key}*' for key in KEYS)} of verl's config")
    add("--samples", type=int, default=16, help="for each problem (default 16)")
    add("--temperature", type=float, default=1.0, help="0 for the most probable tokens (default 1)")
    add("--top-p", type=float, default=1.0, help="default 1")
    add("--max-tokens", type=int, default=4096, help="of a response (default 4096)")
    add("--limit", type=int, default=-1, help="only the first so many problems of each dataset")
    add("--seed", type=int, default=0)
    add("--gpus", type=int, default=1, help="that share the model: vLLM's tensor_parallel_size (default 1)")
    add("--reward", default="pkg://recipe.soup.mathematics.reward", help="FILE.py or pkg://MODULE with compute_score")
    add("--regrade", action="store_true", help="grade all samples anew, e.g. by another reward; none is sampled again")
    add("--out", type=Path, help="folder (default: runs/eval/<model>); a run that was killed goes on there")


def evaluate(args: argparse.Namespace) -> None:
    """Sample, grade, and write the table; what is there already is neither sampled nor graded again."""
    check_arguments(args)
    overrides = [given for given in args.data if "=" in given and not Path(given).exists()]
    model, out = loadable(args.model), args.out or folder_of(args.model)
    config = config_of(args, model, overrides)
    check_folder("model", model, template=not config.actor_rollout_ref.model.custom_chat_template)
    grader, prompts = Grader(config), Prompts(config)
    datasets: dict[str, list[Problem]] = {}
    for given in (given for given in args.data if given not in overrides):
        name, problems = read_data(given, args.limit, config, prompts)
        if name in datasets:
            raise refuse("data", given, f"a second dataset called {name}; evaluate it by a command of its own.")
        grader.require_columns(problems, "data", given)
        datasets[name] = problems
    if not datasets:
        raise refuse("data", " ".join(args.data), f"no dataset among them; give {', '.join(DATASETS)} or a file.")
    sampling = {"n": args.samples, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    asked = {"model": args.model, **sampling, "max_tokens": args.max_tokens}
    asked |= {"overrides": " ".join(overrides)} if overrides else {}
    weights = {"weights": weights_fingerprint(model)}
    reward = {"reward": config.reward.custom_reward_function.path, "reward_source": grader.source()}
    for name in datasets:
        adopt_samples(out / f"{name}.jsonl", out / f"{name}.samples.jsonl")
    samples = {  # first: with other settings they are refused, and then no grade may be gone
        name: open_samples(out / f"{name}.samples.jsonl", {**asked, **weights}, args.samples, problems)
        for name, problems in datasets.items()
    }
    if args.regrade:
        for name in datasets:
            (out / f"{name}.jsonl").unlink(missing_ok=True)
    done = {  # before anything is sampled, since another reward is refused
        name: open_samples(out / f"{name}.jsonl", {**asked, **weights, **reward}, args.samples, problems)
        for name, problems in datasets.items()
    }
    trusted = bool(config.actor_rollout_ref.model.trust_remote_code)
    sample_missing(args, model, sampling, datasets, prompts, samples, out, trusted)
    for name, problems in datasets.items():
        grade_missing(grader, name, problems, samples[name], done[name], out)
    tables = {name: pd.DataFrame([row for rows in done[name].values() for row in rows]) for name in datasets}
    for path in write_table(tables, {**asked, "reward": reward["reward"]}, out):
        print(path)


def sample_missing(
    args: argparse.Namespace,
    model: str,
    sampling: dict[str, Any],
    datasets: dict[str, list[Problem]],
    prompts: Prompts,
    samples: dict[str, dict[int, list[Row]]],
    out: Path,
    trusted: bool,
) -> None:
    """Sample what is not on disk yet; each problem's samples are written as soon as they are there."""
    missing = {
        name: [(i, prompts.ids(problem.messages)) for i, problem in enumerate(problems) if i not in samples[name]]
        for name, problems in datasets.items()
    }
    if not any(missing.values()):
        return
    from recipe.soup.tools.evaluate.engine import Engine  # vLLM takes long to load

    longest = max(len(ids) for asked in missing.values() for _, ids in asked)
    engine = Engine(model, args.gpus, args.max_tokens, sampling, longest, trusted)
    for name, asked in missing.items():
        answers = engine.sample(asked)
        for i, outputs in tqdm(answers, total=len(asked), desc=f"{name}: sampling", unit="problem"):
            samples[name][i] = [sampled(i, datasets[name][i], output) for output in outputs]
            add_problem(out / f"{name}.samples.jsonl", samples[name][i])
        full = sum(samples[name][i][0]["tokens"] == 0 for i, _ in asked)
        if full:
            print(f"{name}: {full} prompts fill the model's context, so their answers are empty, and wrong.")
    engine.close()


def folder_of(model: str) -> Path:
    """Return the default folder of an evaluation: under `runs/eval`, named after what tells the model from others."""
    parts = [part for part in Path(model).parts if part not in ("/", "..", "~", "runs", "checkpoints")]
    return Path("runs") / "eval" / "-".join(parts)
