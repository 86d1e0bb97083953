"""Computes docs/scaling.md: what each source of prefixes costs at scale, by a roofline model and no measurement.

Example:
    python -m benchmarks.scaling    # writes docs/scaling.md
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

FOLDER = Path(__file__).parent
GB = 1e9


@dataclass(frozen=True)
class Model:
    """A dense decoder. `params` without unit; `kv_bytes` a token, in bf16."""

    name: str
    params: float
    kv_bytes: float


@dataclass(frozen=True)
class Gpu:
    """An H200: bytes a second of its memory, dense bf16 operations a second, bytes a second to the host (PCIe 5.0 x16,
    one direction), to the other GPUs of its node (NVLink) and to other nodes (400 Gb/s a GPU)."""

    bandwidth: float = 4.8e12
    flops: float = 990e12
    host: float = 63e9
    nvlink: float = 450e9
    network: float = 50e9
    memory: float = 141e9


@dataclass(frozen=True)
class Run:
    """One training step's shape; lengths in tokens, prefixes uniform from 1 to half of a response."""

    prompts: int = 512
    samples: int = 8
    prompt_tokens: int = 512
    response_tokens: int = 4096
    mixed_share: float = 0.5
    lag: int = 16
    every: int = 4
    dataset: int = 17_000

    @property
    def mixed(self) -> float:
        return self.prompts * self.samples * self.mixed_share

    @property
    def longest_prefix(self) -> float:
        return self.response_tokens / 2

    @property
    def prefix_tokens(self) -> float:
        return self.mixed * self.longest_prefix / 2


EFFICIENCY = 0.4
"""Share of peak bandwidths and of peak operations that a run reaches."""
OLD_LOG_PROBS = 0.47
"""Seconds of the old log-probs for each of the update. By operations it would be 2 / 8. The middle of three published
runs: 107.7 / 269.8, 70.3 / 133.4 and 53.9 / 113.8 s, on 32, 64 and 128 GPUs (`PUBLISHED`)."""
PUBLISHED = "https://verl.readthedocs.io/en/latest/advance/fully_async.html"
PAGEABLE = 8e9
"""Bytes a second from pageable host memory to a GPU, for an engine that loads a snapshot. Assumed."""
WRITING = 1e9
"""Bytes a second that the thread writes which packs a snapshot. Assumed; `snapshot_write.py` measures it."""
OVERHEAD = 2e-3
"""Seconds of one decoding step besides the GPU's work."""
MODELS = (
    Model("0.6B", 0.6e9, 28 * 8 * 128 * 2 * 2),
    Model("1.7B", 1.7e9, 28 * 8 * 128 * 2 * 2),
    Model("4B", 4.0e9, 36 * 8 * 128 * 2 * 2),
    Model("8B", 8.2e9, 36 * 8 * 128 * 2 * 2),
    Model("14B", 14.8e9, 40 * 8 * 128 * 2 * 2),
    Model("32B", 32.8e9, 64 * 8 * 128 * 2 * 2),
    Model("70B", 70.6e9, 80 * 8 * 128 * 2 * 2),
)
GPUS = (8, 64, 512)


H20 = Gpu(bandwidth=4.0e12, flops=148e12, memory=96e9)
"""Data sheet; its links are not used here."""


@dataclass(frozen=True)
class PublishedStep:
    """A synchronous step of Qwen2.5-Math-7B on H20s as verl's page (`PUBLISHED`) gives it, in seconds: 512 prompts x 16
    samples, responses of up to 28 x 1,024 tokens. Their mean length is not given."""

    gpus: int
    step: float
    generation: float
    old_log_probs: float
    update: float

    @property
    def implied_tokens(self) -> float:
        """Tokens a sample, prompt included, if the update reaches `EFFICIENCY` of an H20's operations."""
        return self.update * self.gpus * H20.flops * EFFICIENCY / (8 * QWEN_7B.params) / (512 * 16)


QWEN_7B = Model("Qwen2.5-Math-7B", 7.6e9, 28 * 4 * 128 * 2 * 2)
PUBLISHED_STEPS = (
    PublishedStep(32, 790.10, 357.41, 107.71, 269.80),
    PublishedStep(64, 365.28, 150.72, 70.26, 133.41),
    PublishedStep(128, 356.30, 177.85, 53.92, 113.81),
)


def longest_response(tp: int) -> float:
    """Seconds in which a replica of `tp` H20s decodes one response of 28 x 1,024 tokens by itself."""
    return 28 * 1024 * (2 * QWEN_7B.params / (tp * H20.bandwidth * EFFICIENCY) + OVERHEAD)


class Cost:
    """Seconds and bytes of one step of `run` with `model` on `gpus` GPUs of kind `gpu`."""

    def __init__(self, model: Model, gpus: int, run: Run, gpu: Gpu) -> None:
        self.model, self.gpus, self.run, self.gpu = model, gpus, run, gpu
        # As few GPUs a replica as hold the weights in a third of their memory.
        needed = 2 * model.params / (gpu.memory / 3)
        self.tp = next(size for size in (1, 2, 4, 8) if size >= needed or size == 8)

    def decode(self, sequences: float, tokens: float, context: float) -> float:
        """Seconds to decode `tokens` tokens one after another, for `sequences` sequences spread over all GPUs."""
        bandwidth, flops = self.tp * self.gpu.bandwidth * EFFICIENCY, self.tp * self.gpu.flops * EFFICIENCY
        local = max(sequences / (self.gpus / self.tp), 1)
        memory = (2 * self.model.params + local * context * self.model.kv_bytes) / bandwidth
        return tokens * (max(memory, 2 * self.model.params * local / flops) + OVERHEAD)

    @property
    def generation(self) -> float:
        run = self.run
        return self.decode(run.prompts * run.samples, run.response_tokens, run.prompt_tokens + run.response_tokens / 2)

    @property
    def update(self) -> float:
        """8 operations a parameter and token: forward, again for checkpointed activations, and backward."""
        tokens = self.run.prompts * self.run.samples * (self.run.prompt_tokens + self.run.response_tokens)
        return 8 * self.model.params * tokens / (self.gpus * self.gpu.flops * EFFICIENCY)

    @property
    def old_log_probs(self) -> float:
        return OLD_LOG_PROBS * self.update

    @property
    def step(self) -> float:
        return self.generation + self.old_log_probs + self.update

    @property
    def lookahead(self) -> float:
        """One token more for each prefix; the rest is what the mixed samples no longer decode."""
        return self.generation * self.run.mixed / (self.run.prompts * self.run.samples * self.run.response_tokens)

    @property
    def load(self) -> float:
        """Seconds to bring a snapshot, in bf16, from the host to every GPU, each of which picks its share."""
        return 2 * self.model.params / PAGEABLE

    @property
    def write(self) -> float:
        """Seconds for which the trainer waits, spread over the steps between two snapshots: all GPUs gather the fp32
        weights, and one copies them to the host in bf16."""
        between = self.gpu.nvlink if self.gpus <= 8 else self.gpu.network
        bandwidths = (4 / between + 2 / self.gpu.host) / EFFICIENCY
        return self.model.params * bandwidths / self.run.every

    @property
    def written(self) -> float:
        """Seconds until it can be loaded, while training goes on."""
        return 2 * self.model.params / WRITING

    @property
    def prefixes(self) -> float:
        """Seconds to sample the prefixes on all GPUs."""
        run = self.run
        return self.decode(run.mixed, run.longest_prefix, run.prompt_tokens + run.longest_prefix / 2)

    @property
    def colocated(self) -> float:
        """Wake, load, sample, sleep: nothing overlaps."""
        swap = 2 * 2 * self.model.params / (self.tp * self.gpu.host * EFFICIENCY)
        return swap + self.load + self.prefixes + self.write

    @property
    def standalone_gpus(self) -> float:
        """GPUs of its own that finish the prefixes within the step that they overlap with."""
        for replicas in range(1, self.gpus // self.tp + 1):
            small = Cost(self.model, replicas * self.tp, self.run, self.gpu)
            if small.prefixes + small.load <= self.step:
                return replicas * self.tp
        return self.gpus


def snapshots_kept(run: Run) -> int:
    """As `SnapshotSettings.needed` says."""
    from recipe.soup.settings import SnapshotSettings

    return SnapshotSettings(every=run.every).needed(run.lag)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "docs" / "scaling.md")
    args = parser.parse_args()
    run, gpu = Run(), Gpu()
    # Markdown of our own numbers, in which nothing is to be escaped.
    template = Environment(  # noqa: S701
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((FOLDER / "scaling.md.j2").read_text(encoding="utf-8"))
    lags = (1, 4, 16, 64, 256)
    text = template.render(
        run=run,
        gpu=gpu,
        efficiency=EFFICIENCY,
        overhead=OVERHEAD,
        old_log_probs=OLD_LOG_PROBS,
        published=PUBLISHED,
        pageable=PAGEABLE,
        writing=WRITING,
        costs=[[Cost(model, gpus, run, gpu) for gpus in GPUS] for model in MODELS],
        kept=snapshots_kept(run),
        published_steps=PUBLISHED_STEPS,
        longest={tp: longest_response(tp) for tp in (1, 2, 4)},
        bank=[(lag, run.prefix_tokens * lag, 8 * run.prefix_tokens * lag / GB) for lag in lags],
        replay=(run.dataset * run.samples * run.mixed_share * run.longest_prefix / 2),
        fits=lambda cost: 16 * cost.model.params + 2 * cost.model.params <= 0.9 * cost.gpus * gpu.memory,
    )
    args.output.write_text(text)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
