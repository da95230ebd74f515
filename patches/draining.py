# SPDX-License-Identifier: Apache-2.0
"""Hook on the end of a server: its requests can end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fairkv_sglang.patches.ledger import Hook

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5


async def around_sigterm_watchdog(original: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """A server that is asked to stop does not stay paused.

    SGLang ends when the last request has. While it is paused (``/pause_generation``) none can, and
    those whose clients are gone are not even looked at, so it would wait for ever with all ranks
    spinning.
    """
    resuming = asyncio.create_task(_resume(manager))
    try:
        await original(manager, *args, **kwargs)
    finally:
        resuming.cancel()


async def _resume(manager: Any) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    while True:
        if manager.gracefully_exit and manager.is_pause:
            logger.warning("FairKV: asked to stop while paused, so generation goes on")
            await manager.continue_generation(ContinueGenerationReqInput())
        await asyncio.sleep(LOOK_SECONDS)


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog",
        kind="around",
        function=around_sigterm_watchdog,
        why="a paused server that is asked to stop would wait for its requests for ever",
        since="0.5.17",
        upstream="sglang/srt/managers/tokenizer_manager.py",
        test="tests/patches/test_draining.py",
    ),
)
