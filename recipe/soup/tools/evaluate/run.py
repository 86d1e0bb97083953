"""`soup-verl eval`: sample a model on datasets, grade the samples, and write their table."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from recipe.soup.checks.model import check_folder
from recipe.soup.errors import refuse
from recipe.soup.mathematics.datasets import DATASETS, load
from recipe.soup.records.problems import Problem, problems_of, read_problems
from recipe.soup.tools.evaluate.checkpoint import loadable, weights_fingerprint
from recipe.soup.tools.evaluate.samples import Row, add_problem, facts, open_samples
from recipe.soup.tools.evaluate.table import write_table
from recipe.soup.verl_adapter.probes import load_reward, source_of

EXAMPLES = """examples:
  soup-verl eval Qwen/Qwen3-1.7B math500 amc23 --samples 16
  soup-verl eval runs/countdown/soup/checkpoints/global_step_80 examples/countdown/data/val.parquet \\
      --reward pkg://examples.countdown.reward --max-tokens 24
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl eval`."""
    add = parser.add_argument
    add("model", help="checkpoint of verl (global_step_N), Hugging Face folder, or name on the hub")
    add("data", nargs="+", help=f"{', '.join(DATASETS)}; or parquet files in verl's columns")
    add("--samples", type=int, default=16, help="for each problem (default 16)")
    add("--temperature", type=float, default=1.0, help="0 for the most probable tokens (default 1)")
    add("--top-p", type=float, default=1.0, help="default 1")
    add("--max-tokens", type=int, default=4096, help="of a response (default 4096)")
    add("--limit", type=int, default=-1, help="only the first so many problems of each dataset")
    add("--seed", type=int, default=0)
    add("--gpus", type=int, default=1, help="that share the model: vLLM's tensor_parallel_size (default 1)")
    add("--reward", default="pkg://recipe.soup.mathematics.reward", help="FILE.py or pkg://MODULE with compute_score")
    add("--out", type=Path, help="folder (default: runs/eval/<model>); a run that was killed goes on there")


def read_data(name: str, limit: int) -> tuple[str, list[Problem]]:
    """Read a dataset by its name or its file; returns what to call it, and its problems."""
    if name in DATASETS:
        problems = problems_of(load(name))
    elif Path(name).suffix == ".parquet" and Path(name).exists():
        problems = read_problems(name)
    else:
        raise refuse("data", name, f"no such parquet file, and none of {', '.join(DATASETS)}.")
    return Path(name).stem, problems if limit < 0 else problems[:limit]


def folder_of(model: str) -> Path:
    """Return the default folder of an evaluation: under `runs/eval`, named after what tells the model from others."""
    parts = [part for part in Path(model).parts if part not in ("/", "..", "~", "runs", "checkpoints")]
    return Path("runs") / "eval" / "-".join(parts)


def evaluate(args: argparse.Namespace) -> None:
    """Sample, grade, and write the table; what is there already is not sampled again."""
    if args.temperature == 0 and args.samples > 1:
        raise refuse("--samples", args.samples, "at temperature 0 all samples are equal; give --samples 1.")
    reward = load_reward(args.reward)
    datasets: dict[str, list[Problem]] = {}
    for given in args.data:
        name, problems = read_data(given, args.limit)
        if name in datasets:
            raise refuse("data", given, f"a second dataset called {name}; evaluate it by a command of its own.")
        datasets[name] = problems
    model, out = loadable(args.model), args.out or folder_of(args.model)
    check_folder("model", model)
    sampling = {"n": args.samples, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    shown = {"model": args.model, **sampling, "max_tokens": args.max_tokens, "reward": args.reward}
    settings = {**shown, "weights": weights_fingerprint(model), "reward_source": source_of(reward)}
    found = {
        name: open_samples(out / f"{name}.jsonl", settings, args.samples, problems)
        for name, problems in datasets.items()
    }
    missing = {
        name: [(i, problem) for i, problem in enumerate(problems) if i not in found[name]]
        for name, problems in datasets.items()
    }
    if any(missing.values()):
        from recipe.soup.tools.evaluate.engine import Engine  # vLLM takes long to load

        asked = [problem.messages for problems in missing.values() for _, problem in problems]
        engine = Engine(model, args.gpus, args.max_tokens, sampling, asked)
        for name, problems in missing.items():
            answers = engine.sample([(i, problem.messages) for i, problem in problems])
            known = dict(problems)
            for i, outputs in tqdm(answers, total=len(problems), desc=name, unit="problem"):
                rows = [graded(known[i], i, output, reward(known[i], output.text)) for output in outputs]
                add_problem(out / f"{name}.jsonl", rows)
                found[name][i] = rows
        engine.close()
    tables = {name: pd.DataFrame([row for rows in found[name].values() for row in rows]) for name in datasets}
    for path in write_table(tables, shown, out):
        print(path)


def graded(problem: Problem, number: int, output: Any, score: dict[str, Any]) -> Row:
    """Make one line of the samples; names are those of verl's dumps where they have one."""
    return {
        "problem": number,
        **facts(problem),
        "output": output.text,
        "acc": float(score["score"] > 0),
        **score,
        "tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
    }
