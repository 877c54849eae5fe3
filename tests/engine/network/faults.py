"""A Kernel that refuses: every call goes through to the World's own, except one."""

import dataclasses
import errno
from collections.abc import Callable
from typing import Any, cast

from isopod.world.kernel import Kernel
from isopod.world.world import World


class RefusingKernel:
    """Lets `refuse(method)` decide, before each call, whether it fails with EIO instead."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.refuse: Callable[[str], bool] = lambda method: False
        self.calls: list[str] = []

    def __getattr__(self, method: str) -> Any:
        real = getattr(self._kernel, method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(method)
            if self.refuse(method):
                raise OSError(errno.EIO, "refused by the test")
            return await real(*args, **kwargs)

        return call


def with_refusing_kernel(world: World) -> tuple[World, RefusingKernel]:
    """Return the same World over a kernel that can refuse."""
    kernel = RefusingKernel(world.kernel)
    return dataclasses.replace(world, kernel=cast(Kernel, kernel)), kernel
