# SPDX-License-Identifier: Apache-2.0
"""Errors of device kernels reach the host with the result of the pass in which they happened.

A device kernel that finds no free page or a full row cannot raise: it leaves the lane as it was and
sets a bit in ``HeadPages.error``. From then on answers are wrong, so the rank has to stop before it
gives one out. The word follows each pass on its stream into pinned memory, and is read when SGLang
waits for that pass's result anyway.
"""

from __future__ import annotations

import torch

from fairkv_sglang.kernels.pages import describe_error

RING = 4
"""Passes under way at most; bits stay set, so an older pass may read the word of a later one."""


class DeviceErrors:
    """Copies of one rank's error word. UNTESTED ON A GPU.

    Args:
        word: ``int32 [1]`` on the device, set by kernels.
    """

    def __init__(self, word: torch.Tensor) -> None:
        self.word = word
        on_cuda = word.device.type == "cuda"
        self._copies = torch.zeros(RING, dtype=torch.int32, pin_memory=on_cuda)
        self._arrived = [torch.cuda.Event() for _ in range(RING)] if on_cuda else None
        self._passes = 0

    def send(self) -> int:
        """After a pass, on its stream: start the copy; returns the ticket of :meth:`check`."""
        at, self._passes = self._passes % RING, self._passes + 1
        self._copies[at : at + 1].copy_(self.word, non_blocking=True)
        if self._arrived is not None:
            self._arrived[at].record()
        return at

    def check(self, ticket: int) -> None:
        """When the pass's result is wanted: it has ended, or SGLang would wait for it next.

        Raises:
            RuntimeError: if a kernel reported an error in this pass or before.
        """
        if self._arrived is not None:
            self._arrived[ticket].synchronize()
        if bits := int(self._copies[ticket]):
            raise RuntimeError(
                f"FairKV stops: a device kernel reported: {describe_error(bits)}; answers from "
                "here on would be wrong"
            )
