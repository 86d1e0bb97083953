"""In the place of `python` while a script for GPUs runs: notes down how verl would be started, and starts nothing.

What would itself start verl is run, with this as its interpreter. Everything else, such as checks of what a run wrote,
is left out.
"""

import json
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

VERL = "verl.trainer.main_ppo"
MAKES = {
    "benchmarks.random_model": ["--layers", "1", "--hidden", "8", "--heads", "2", "--vocabulary", "1024"],
    "examples.smollm2.build_data": [],
}
"""What else is run, with these arguments more: of a model the tokenizer and the kind count, not the weights."""


def main(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", VERL]:
        with Path(os.environ["VERL_CALLS"]).open("a") as calls:
            calls.write(json.dumps(arguments[2:]) + "\n")
    elif arguments[:1] == ["-m"]:
        module, rest = arguments[1], arguments[2:]
        sys.path[0] = os.getcwd()
        spec = find_spec(module) if module.startswith("benchmarks.") else None
        starts_verl = spec is not None and spec.origin is not None and VERL in Path(spec.origin).read_text()
        if module in MAKES or starts_verl:
            sys.executable = os.environ["FAKE_PYTHON"]
            sys.argv = [module, *rest, *MAKES.get(module, [])]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:  # a line of Python in the script itself
        os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
