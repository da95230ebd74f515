# SPDX-License-Identifier: Apache-2.0
"""A server that is asked to stop ends, paused or not."""

from __future__ import annotations

import asyncio

import pytest

from fairkv_sglang.patches import draining


class Manager:
    """SGLang's tokenizer manager: waits for SIGTERM, then for the last request."""

    def __init__(self, paused: bool, stopping: bool) -> None:
        self.is_pause, self.gracefully_exit = paused, stopping
        self.requests = 3

    async def continue_generation(self, request: object) -> None:
        self.is_pause = False

    async def sigterm_watchdog(self) -> None:
        while not self.gracefully_exit or self.requests:
            if not self.is_pause:
                self.requests = 0
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("paused", [False, True])
def test_a_paused_server_that_is_asked_to_stop_goes_on(paused: bool) -> None:
    manager = Manager(paused, stopping=True)
    ending = draining.around_sigterm_watchdog(Manager.sigterm_watchdog, manager)
    asyncio.run(asyncio.wait_for(ending, 10))
    assert manager.requests == 0


def test_nobody_else_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "LOOK_SECONDS", 0.01)
    manager = Manager(paused=True, stopping=False)
    ending = draining.around_sigterm_watchdog(Manager.sigterm_watchdog, manager)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(ending, 0.2))
    assert manager.is_pause and manager.requests == 3
