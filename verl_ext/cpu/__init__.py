"""The CPU platform: verl's whole real path (Ray, FSDP2, vLLM) without an accelerator. Opt-in by `hardware=cpu`.

A GPU cluster's head node may have no GPU, so a missing GPU must never select this platform.
"""

from collections.abc import Mapping, Sequence

CPU_ENV = {
    "VERL_PLATFORM": "cpu",
    # verl registers its FSDP engines for `cuda` and `npu`; the `cuda` one runs on a CPU as it is.
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM would pin its threads to the cores that the trainer needs next.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    # vLLM would compile one small function of its sampler: this takes 20 s at the first request, and needs a compiler.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Environment of a CPU run. What the user has not set is set in the driver, and the Ray that it starts inherits it.
`config/hardware/cpu.yaml` repeats the two variables of verl, for a Ray at another address."""


def cpu_requested(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether this process was asked to run on the CPU platform.

    verl chooses its platform while it is imported, before Hydra reads the command line, so the driver looks for the
    override itself. Workers find VERL_PLATFORM in their environment.
    """
    return "hardware=cpu" in argv or environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
