"""The commands for GPUs that this project prints or ships, how they start verl, and stand-ins for the hub."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.data.prepare import prepare
from examples.smollm2.build_data import build
from recipe.soup.mathematics.datasets import DAPO_AFTER, DAPO_BEFORE

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "recipe/soup/README.md", "examples/smollm2/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = sorted((ROOT / "examples").glob("run_*.sh"))
STARTS_VERL = r"(?:python -m verl\.trainer\.main_ppo|examples/run_[\w.-]+\.sh|benchmarks/gpu\.sh)"
FAMILIES = {"qwen3": ("qwen3", 32768), "qwen2.5-math": ("qwen2", 4096), "smollm2": ("llama", 8192)}
"""Of models on the hub: `model_type` of their config, and the tokens that they were trained for."""
CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def commands_in(document: Path) -> list[str]:
    """What a document tells to type on a machine with GPUs: in blocks of code, and in lines of text.

    `... key=value` stands for the command of the algorithm with these keys.
    """
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^    (.*)$", text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    found = [re.sub(r"^\.\.\. ", "python -m verl.trainer.main_ppo ", line) for line in blocks] + spans
    matches = [re.search(rf"(?<![\w/]){STARTS_VERL} [^#]+", line) for line in found]
    commands = [" ".join(match.group().split()) for match in matches if match]
    return [command for command in commands if "hardware=cpu" not in command]


def usage(script: Path) -> list[str]:
    """The lines of a script's header that show how it is called, with each of their alternatives (`a|b`)."""
    shown = re.findall(rf"^#  +({STARTS_VERL}[^#\[\n]*)", script.read_text(), re.MULTILINE)
    alternatives = [[word.split("|") for word in line.split()] for line in shown]
    return [" ".join(words) for line in alternatives for words in itertools.product(*line)]


def all_commands() -> list[str]:
    found = [command for document in DOCUMENTS for command in commands_in(document)]
    found += [command for script in (*SCRIPTS, ROOT / "benchmarks/gpu.sh") for command in usage(script)]
    # `all` starts the others, where there is a GPU, and `lab` starts no run of verl.
    others = ("benchmarks/gpu.sh all", "benchmarks/gpu.sh lab")
    return [command for command in dict.fromkeys(found) if not command.startswith(others)]


class Workplace:
    """A folder with copies of the scripts, in which they run with a `python` that only notes down what they start.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("examples", "benchmarks"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "gpu"))
        self.models, self.data = folder / "models", folder / "data"
        _write_rows(self.data)
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir()
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/support/fake_python.py "$@"\n')
        self.python.chmod(0o755)

    def calls(self, command: str) -> list[list[str]]:
        """The arguments of each `python -m verl.trainer.main_ppo` that a command starts."""
        if "example=smollm2" in command:  # whose data an earlier command of the document makes
            build(self.folder / "runs" / "smollm2" / "data", 4096, 128, 0)
        calls = self.folder / "calls"
        calls.write_text("")
        environ = {
            **{key: value for key, value in os.environ.items() if key != "SMOLLM2"},
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MATH_DATA": str(self.data),
            "VERL_CALLS": str(calls),
            "FAKE_PYTHON": str(self.python),
        }
        # What comes after verl fails for want of results.
        run = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environ, capture_output=True, text=True, timeout=300
        )
        started = [json.loads(line) for line in calls.read_text().splitlines()]
        assert started, f"{command} starts no run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
        return started


def _write_rows(folder: Path) -> None:
    """One row a dataset, by `examples.data.prepare` from the columns that the hub has."""
    folder.mkdir()
    prompt = [{"role": "user", "content": f"{DAPO_BEFORE}\n\nWhat is $1+1$?\n\n{DAPO_AFTER}"}]
    hub = {
        "dapo_math_17k": {"prompt": prompt, "reward_model": {"ground_truth": "2"}},
        "math500": {"problem": "What is $1+1$?", "answer": "2"},
    }
    for name, row in hub.items():
        pd.DataFrame([row]).to_parquet(folder / "hub.parquet")
        prepare(name, folder, folder / "hub.parquet")
    rows = pd.read_parquet(folder / "math500.parquet").assign(data_source="openai/gsm8k")  # verl has a reward for it
    rows.to_parquet(folder / "of_the_user.parquet")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for those of Qwen and SmolLM2: a token a byte, their special tokens, a template of their form."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )


def write_stand_in(folder: Path, model: str) -> Path:
    """A folder with the stand-in's tokenizer, a config, and no weights to speak of; `model`: its name on the hub."""
    model_type, positions = next(facts for family, facts in FAMILIES.items() if family in model.lower())
    path = folder / model.strip("/").replace("/", "--")
    build_tokenizer().save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "max_position_embeddings": positions}))
    save_file({"none": torch.zeros(1)}, path / "model.safetensors")
    return path
