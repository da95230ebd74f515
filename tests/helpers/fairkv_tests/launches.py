# SPDX-License-Identifier: Apache-2.0
"""Counts what a GPU would be given: launches of Triton kernels, operations of torch, waits.

With Triton's interpreter and CPU tensors, so it needs no GPU. Of torch's operations those count
that start a kernel or a copy on a device; views and allocations do not. A wait is an operation for
whose value Python waits, or a copy to or from ordinary host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view",
    "_reshape_alias", "diagonal", "resize_", "set_", "movedim",
}  # fmt: skip
"""Operations of torch that launch nothing on a device."""
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}
"""Operations for whose value or size the host waits."""


@dataclass
class Launches:
    """What was launched, by name."""

    kernels: list[str] = field(default_factory=list)
    torch: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Launches, Triton's and torch's."""
        return len(self.kernels) + len(self.torch)


class _Mode(TorchDispatchMode):
    def __init__(self, made: Launches) -> None:
        super().__init__()
        self.made, self.inside = made, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if not self.inside and name not in FREE:
            (self.made.waits if name in WAITS else self.made.torch).append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[Launches]:
    """Launches within; what the interpreter itself does in torch does not count."""
    made = Launches()
    mode = _Mode(made)
    run = interpreter.GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        made.kernels.append(executor.fn.__name__)
        mode.inside += 1
        try:
            return run(executor, *args, **kwargs)
        finally:
            mode.inside -= 1

    with mock.patch.object(interpreter.GridExecutor, "__call__", counted), mode:
        yield made
