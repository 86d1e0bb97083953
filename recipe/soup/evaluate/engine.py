"""Sampling with vLLM, problem by problem as they are done."""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, cast

from verl_ext.cpu import CPU_ENV
from verl_ext.cpu.vllm_distribution import CPU_BUILD

Conversation = list[dict[str, str]]


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
        tensor_parallel_size: GPUs that share the model.
        max_tokens: of a response.
        sampling: vLLM's SamplingParams: n, temperature, top_p, seed. Problem i samples with the seeds from
            `seed + i * n` on, so that a run that was killed goes on with what it would have sampled.
    """

    def __init__(self, model: str, tensor_parallel_size: int, max_tokens: int, sampling: dict[str, Any]) -> None:
        extra: dict[str, Any] = {}
        if _is_cpu_build():
            for key in (key for key in CPU_ENV if key.startswith("VLLM_")):
                os.environ.setdefault(key, CPU_ENV[key])
            extra = {"dtype": "float32", "enforce_eager": True}  # as the CPU example trains
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self._llm = LLM(model, tensor_parallel_size=tensor_parallel_size, **extra)
        self._max_tokens, self._sampling = max_tokens, sampling
        self._tokenizer: Any = self._llm.get_tokenizer()

    def sample(self, conversations: Sequence[tuple[int, Conversation]]) -> Iterator[tuple[int, list[Any]]]:
        """All answers to each conversation, in the order in which they are done.

        Args:
            conversations: number of the problem, and its messages.

        Yields:
            the number, and vLLM's `n` outputs: `text`, `token_ids`, `finish_reason` ("stop", or "length" if cut off).
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        room = engine.vllm_config.model_config.max_model_len
        first, n = self._sampling["seed"], self._sampling["n"]
        for number, messages in conversations:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            params = SamplingParams(
                **{**self._sampling, "seed": first + number * n},
                max_tokens=min(self._max_tokens, room - len(ids)),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                yield int(output.request_id), list(cast(Any, output.outputs))

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.llm_engine.engine_core.shutdown()
