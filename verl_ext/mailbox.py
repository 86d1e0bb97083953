"""Something that one process leaves and others wait for, in a Ray actor.

In a file of its own, so that the actor's process imports nothing of verl.
"""

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds letters by name. `get` may come before `put`, and waits for it."""

    def __init__(self) -> None:
        self._letters: dict[str, asyncio.Future[Any]] = {}

    def _letter(self, name: str) -> "asyncio.Future[Any]":
        return self._letters.setdefault(name, asyncio.get_running_loop().create_future())

    async def put(self, name: str, content: Any) -> None:
        """Leave a letter, once."""
        self._letter(name).set_result(content)

    async def get(self, name: str) -> Any:
        """Wait for a letter, and read it; it stays."""
        return await self._letter(name)

    async def drop(self, name: str) -> None:
        """Throw a letter away."""
        self._letters.pop(name, None)
