"""The CPU platform: verl's whole real path (Ray, FSDP2, vLLM) without an accelerator. Opt-in by `hardware=cpu`.

A GPU cluster's head node has no GPU either, so the absence of one must never select this platform.
"""

from collections.abc import Mapping, Sequence

CPU_ENV = {
    "VERL_PLATFORM": "cpu",
    # verl registers its FSDP engines for `cuda` and `npu`; the `cuda` one runs on a CPU as it is.
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM would pin its threads to cores that the trainer, waiting its turn, needs next.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    # vLLM would compile one small function of its sampler: 20 s at the first request, and a compiler is needed.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Defaults for the environment of a CPU run: set in the driver where the user has not, and inherited by the Ray that it
starts. The two of verl also stand in `config/hardware/cpu.yaml`, for who gives that Ray another address."""


def cpu_requested(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """True if this process was asked to run on the CPU platform.

    verl fixes its platform while it is imported, before Hydra reads the command line, so the driver looks for the
    override itself; workers find VERL_PLATFORM in their environment.
    """
    return "hardware=cpu" in argv or environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
