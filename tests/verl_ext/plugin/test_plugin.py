"""The plugin: cheap, lazy, and effective in the process that needs it."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from verl_ext.cpu import cpu_requested

Run = Callable[..., Any]
HEAVY = [
    "recipe.soup.verl_adapter.trainer",
    "recipe.soup.verl_adapter.agent_loop",
    "verl.trainer.ppo.v1",
    "vllm",
    "transformers.modeling_utils",
]


@pytest.fixture
def run(clean_environ: dict[str, str]) -> Run:
    def run(script: str, **environ: str) -> Any:
        command = [sys.executable, "-c", script]
        environ = {**clean_environ, **environ}
        result = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_cpu_is_opt_in() -> None:
    assert cpu_requested(["main_ppo", "hardware=cpu"], {})
    assert cpu_requested([], {"VERL_PLATFORM": " CPU "})
    assert not cpu_requested(["main_ppo", "algorithm=soup"], {"VERL_PLATFORM": "nvidia"})


def test_import_verl_loads_the_plugin_and_nothing_heavy_with_it(run: Run) -> None:
    script = f"""
import json, sys
import verl
print(json.dumps({{"plugin": "verl_ext.plugin" in sys.modules, "heavy": [m for m in {HEAVY} if m in sys.modules]}}))
"""
    without = run(script, VERL_USE_EXTERNAL_PLUGINS="none")
    with_plugin = run(script)
    assert with_plugin["plugin"]
    assert not without["plugin"]
    assert with_plugin["heavy"] == without["heavy"]


def test_registrations_arrive_with_the_verl_module_that_they_extend(run: Run) -> None:
    result = run("""
import json
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
names = [get_adv_estimator_fn("soup").__name__, get_policy_loss_fn("soup").__name__]
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
print(json.dumps([*names, get_trainer_cls("soup").__name__, _agent_loop_registry["soup_agent"]["_target_"]]))
""")
    assert result == [
        "compute_soup_advantage",
        "compute_soup_policy_loss",
        "SoupTrainer",
        "recipe.soup.verl_adapter.agent_loop.SoupAgentLoop",
    ]


def test_cpu_process(run: Run) -> None:
    result = run(
        """
import json, verl
from importlib.metadata import version
from verl.utils import distributed
from verl.utils.device import get_device_name, get_nccl_backend
import verl.third_party.vllm as third_party
print(json.dumps([get_device_name(), get_nccl_backend(), version("vllm"), third_party.vllm_version,
                  distributed.initialize_global_process_group_ray.keywords]))
""",
        VERL_PLATFORM="cpu",
    )
    device, backend, version, seen_by_verl, keywords = result
    assert (device, backend) == ("cpu", "gloo")
    assert version == seen_by_verl
    assert version.endswith("+cpu")
    assert keywords == {"backend": "gloo"}


def test_without_the_request_nothing_of_the_cpu_platform_is_there(run: Run) -> None:
    result = run("""
import json, os, sys, verl
from importlib.metadata import PackageNotFoundError, version
try:
    found = version("vllm")
except PackageNotFoundError:
    found = None
print(json.dumps([found, "verl_ext.cpu.platform" in sys.modules, os.environ.get("VERL_ENGINE_DEVICE")]))
""")
    assert result[1:] == [False, None]
    assert result[0] is None or not result[0].endswith("+cpu")
