"""A step of the lab with a language model: seconds, the best that this device could do, and the ratio of both.

The best is what the device's own matrix product and sum say, measured right here: the update and the reading of prompts
take their multiplications, and each decoded token reads all weights and all keys and values once, or takes its
multiplications, whichever is longer. Attention's own multiplications, the optimizer and Python are left out.

Before that, loss and gradient on some samples in float32 against the plain path on the CPU.

    python -m benchmarks.lab_step                                   # SmolLM2, 32 prompts x 8 samples x 48 tokens
    python -m benchmarks.lab_step --steps 2 data.train_batch_size=8 actor_rollout_ref.actor.ppo_mini_batch_size=8 \\
        actor_rollout_ref.rollout.n=4 data.max_response_length=24   # what a CPU does in a minute or so
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from recipe.soup.verl_adapter.compose import composed

OVERRIDES = [
    "algorithm=grpo",
    "example=smollm2",
    "data.train_batch_size=32",
    "data.max_response_length=48",
    "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384",
    "trainer.logger=[]",
]
COMPARED = 32
"""Samples whose loss and gradient are compared with the CPU's."""
UNCOUNTED = 2
"""Steps at the beginning, in which graphs are recorded and memory is taken."""


@dataclass(frozen=True)
class Size:
    """What a step has to compute.

    Attributes:
        body: parameters of the layers.
        head: parameters of the matrix that gives logits.
        prompts: tokens of prompts, each prompt once.
        responses: tokens of responses.
        columns: tokens of the longest response: so often all weights are read.
        kept: bytes of keys and values that are read, all columns together.
        bytes_each: of a weight.
    """

    body: int
    head: int
    prompts: int
    responses: int
    columns: int
    kept: int
    bytes_each: int


def bounds(size: Size, multiplications: float, bandwidth: float) -> dict[str, float]:
    """The least seconds that each part of a step takes.

    Args:
        multiplications: floating-point operations a second.
        bandwidth: bytes read a second.
    """
    reads = size.columns * (size.body + size.head) * size.bytes_each + size.kept
    decode = max(2 * size.responses * (size.body + size.head) / multiplications, reads / bandwidth)
    forward = 2 * (size.body * (size.prompts + size.responses) + size.head * size.responses) / multiplications
    generate = 2 * size.body * size.prompts / multiplications + decode
    return {"generate": generate, "step": generate + 4 * forward}  # old log-probs, and an update: three times as much


def size_of(model: Any, samples: list[Any], dtype: torch.dtype) -> Size:
    """Of the step that these samples are from."""
    chosen = model.config
    body = sum(parameter.numel() for parameter in model.model.layers.parameters())
    head = model.get_output_embeddings().weight.numel()
    prompts = {tuple(sample.prompt_ids) for sample in samples}
    lengths = [len(sample.response_ids) for sample in samples]
    head_size = getattr(chosen, "head_dim", None) or chosen.hidden_size // chosen.num_attention_heads
    of_a_token = 2 * chosen.num_hidden_layers * chosen.num_key_value_heads * head_size * dtype.itemsize
    seen = [n * len(sample.prompt_ids) + n * (n + 1) // 2 for sample, n in zip(samples, lengths, strict=True)]
    kept = of_a_token * sum(seen)
    return Size(body, head, sum(map(len, prompts)), sum(lengths), max(lengths), kept, dtype.itemsize)


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The shortest of some runs."""
    taken = []
    for _ in range(repeats + 1):  # the first warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations, and bytes read, a second: of a large matrix product, and of a large sum."""
    side, numbers = (8192, 2**29) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    multiplications = 2 * side**3 / seconds_of(lambda: a @ b, device)
    memory = torch.zeros(numbers, device=device)
    return multiplications, memory.nbytes / seconds_of(lambda: memory.sum(), device)


def against_the_cpu(lab: Any, samples: list[Any], fields: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative differences of loss and gradient in float32: this device, prompts shared, and the CPU, plainly."""
    from recipe.soup.lab.forward import SharedPrompts, forward
    from recipe.soup.lab.hardware import Hardware
    from recipe.soup.lab.update import Updater

    # Advantages of a group add up to nothing, and a loss of nothing has no relative error.
    fields = {**fields, "advantages": fields["advantages"] + 0.5}
    shared = SharedPrompts(Hardware(lab.hardware.device, torch.float32, shares_prompts=True))
    found = []
    for device, computes in ((torch.device("cpu"), forward), (lab.hardware.device, shared)):
        model = copy.deepcopy(lab.model).to(device)
        updater = Updater(model, torch.optim.SGD(model.parameters()), lab.config, lab.settings, computes)
        loss, _ = updater.loss(samples, fields, slice(0, min(COMPARED, len(samples))))
        loss.backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        found.append((float(loss.detach()), gradient))
    (loss, gradient), (ours, our_gradient) = found
    return abs(ours / loss - 1), float((our_gradient - gradient).norm() / gradient.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help=f"counted ones, behind {UNCOUNTED} that are not")
    args, overrides = parser.parse_known_args()
    config = composed([*OVERRIDES, *overrides])
    from recipe.soup.lab.driver import Lab

    lab: Any = Lab(config)
    device, dtype = lab.hardware.device, lab.hardware.dtype
    multiplications, bandwidth = rates(device, dtype)
    update, trained = lab.updater.update, []

    def kept(samples: list[Any], fields: dict[str, torch.Tensor]) -> dict[str, float]:
        if not trained:
            print("loss and gradient against the CPU: {:.1e} and {:.1e}".format(*against_the_cpu(lab, samples, fields)))
        trained.append(samples)
        return update(samples, fields)

    lab.updater.update = kept
    rows = []
    for step in range(1, UNCOUNTED + args.steps + 1):
        began = time.perf_counter()
        metrics = lab.step(step)
        least = bounds(size_of(lab.model, trained[-1], dtype), multiplications, bandwidth)
        taken = {"generate": metrics["timing_s/gen"], "step": metrics["timing_s/step"]}
        rows.append({name: (taken[name], least[name]) for name in taken})
        print(f"step {step}: {time.perf_counter() - began:.2f} s", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, {dtype}: {multiplications / 1e12:.3g} TFLOP/s, {bandwidth / 1e9:.3g} GB/s\n")
    print("| part | seconds | least | ratio |\n|---|---|---|---|")
    for name in ("generate", "step"):
        seconds, least = (statistics.median(row[name][i] for row in rows[UNCOUNTED:]) for i in (0, 1))
        print(f"| {name} | {seconds:.3f} | {least:.4f} | {seconds / least:.1f} |")


if __name__ == "__main__":
    main()
