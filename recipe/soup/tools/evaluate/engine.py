"""Sample with vLLM, and yield each problem's samples as soon as they are done."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, cast

import numpy as np

from verl_ext.cpu import CPU_ENV
from verl_ext.cpu.vllm_distribution import CPU_BUILD


@dataclass(frozen=True)
class NoRoom:
    """The answer to a prompt that fills the model's context: empty, and cut off."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"


def first_seed(seed: int, number: int) -> int:
    """Return the first seed of a problem's samples, which get consecutive seeds; no two runs or problems share any."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _is_cpu_build() -> bool:
    try:
        distribution(CPU_BUILD)
    except PackageNotFoundError:
        return False
    return True


class Engine:
    """vLLM around one model.

    Args:
        model: folder or hub name.
        tensor_parallel_size: number of GPUs that share the model.
        max_tokens: limit of a response.
        sampling: vLLM's SamplingParams: n, temperature, top_p, seed.
        longest: tokens of the longest prompt; they decide how much memory is needed.
        trust_remote_code: whether to run code that comes with the model; verl's key of the same name.
    """

    def __init__(
        self,
        model: str,
        tensor_parallel_size: int,
        max_tokens: int,
        sampling: dict[str, Any],
        longest: int,
        trust_remote_code: bool,
    ) -> None:
        extra: dict[str, Any] = {}
        if _is_cpu_build():
            for key in (key for key in CPU_ENV if key.startswith("VLLM_")):
                os.environ.setdefault(key, CPU_ENV[key])
            # The CPU example trains with these two; and each prompt must be read in one piece, since vLLM turns the
            # request's random generator back by an offset after a first piece, and a CPU's generator has no offset.
            extra = {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from transformers import AutoConfig
        from vllm import LLM

        self._max_tokens, self._sampling = max_tokens, sampling
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        context = getattr(config, "max_position_embeddings", longest + max_tokens)
        # A long context asks for more memory than these samples need.
        self._room = min(context, longest + max_tokens)
        self._llm = LLM(
            model,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=self._room,
            trust_remote_code=trust_remote_code,
            **extra,
        )

    def sample(self, prompts: Sequence[tuple[int, list[int]]]) -> Iterator[tuple[int, list[Any]]]:
        """Sample all answers to each prompt; yields them in the order in which they are done.

        Args:
            prompts: for each problem its number and its prompt's token ids.

        Yields:
            the problem's number, and vLLM's `n` outputs: `text`, `token_ids` and `finish_reason` ("stop", or "length"
            if the output was cut off).
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for number, ids in prompts:
            if len(ids) >= self._room:
                yield number, [NoRoom()] * self._sampling["n"]
                continue
            params = SamplingParams(
                **{**self._sampling, "seed": first_seed(self._sampling["seed"], number)},
                max_tokens=min(self._max_tokens, self._room - len(ids)),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                yield int(output.request_id), list(cast(Any, output.outputs))

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.llm_engine.engine_core.shutdown()
