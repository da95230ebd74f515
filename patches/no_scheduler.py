# SPDX-License-Identifier: Apache-2.0
"""The hook of a process that runs a model without SGLang's scheduler: ``one_batch``."""

from __future__ import annotations

from typing import Any

from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.patches.passes import before_forward_batch
from fairkv_sglang.patches.rank import this_rank


def before_init_forward(
    cls: type, batch: Any, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What ``before_forward_batch`` does for a scheduler's passes.

    Nobody looks at the errors of a pass here, so that is done before the next prompts.
    """
    if batch.forward_mode.is_extend():
        errors = this_rank().book.errors
        errors.check(errors.send())
    return before_forward_batch(None, batch)


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="before",
        function=before_init_forward,
        why="without a scheduler's worker nobody says which prompts end in a pass",
        since="0.5.21",
        upstream="sglang/benchmark/one_batch.py (extend, decode)",
        test="tests/engine/test_benchmarks.py",
    ),
)
