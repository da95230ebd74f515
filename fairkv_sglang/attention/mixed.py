# SPDX-License-Identifier: Apache-2.0
"""Mixed batches cut in two: prompts run on SGLang's modules, running requests on their twins.

With mixed chunks (``--enable-mixed-chunk``) a pass holds prompts and, behind them, one token of
each running request; SGLang treats them all as prompts.
"""

from __future__ import annotations

import copy
from typing import Any

from fairkv_sglang.attention.forward_plan import ForwardPlan

_PER_REQUEST = (
    "req_pool_indices",
    "seq_lens",
    "seq_lens_cpu",
    "extend_prefix_lens",
    "extend_prefix_lens_cpu",
    "extend_seq_lens",
    "extend_seq_lens_cpu",
    "extend_start_loc",
)


def prompts_only(forward_batch: Any, plan: ForwardPlan) -> Any:
    """The batch without its running requests."""
    requests, tokens = len(plan.spans), plan.prompt_tokens
    batch = _cut(forward_batch, slice(0, requests), slice(0, tokens))
    batch.extend_num_tokens = tokens
    return batch


def running_only(forward_batch: Any, plan: ForwardPlan) -> Any:
    """The batch without its prompts, as a decode batch."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    requests, tokens = len(plan.spans), plan.prompt_tokens
    end = requests + len(plan.decode_rows)
    batch = _cut(forward_batch, slice(requests, end), slice(tokens, tokens + end - requests))
    batch.forward_mode = ForwardMode.DECODE
    return batch


def _cut(forward_batch: Any, requests: slice, tokens: slice) -> Any:
    batch = copy.copy(forward_batch)
    for name in _PER_REQUEST:
        values = getattr(forward_batch, name, None)
        if values is not None:
            setattr(batch, name, values[requests])
    batch.batch_size = requests.stop - requests.start
    batch.out_cache_loc = forward_batch.out_cache_loc[tokens]
    batch.positions = forward_batch.positions[tokens]
    batch.input_ids = None if forward_batch.input_ids is None else forward_batch.input_ids[tokens]
    if batch.seq_lens_cpu is not None:
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
    return batch
