# SPDX-License-Identifier: Apache-2.0
"""Mixed batches cut in two: prompts run on SGLang's modules, running requests on their twins.

With mixed chunks (``--enable-mixed-chunk``) a pass holds prompts and, behind them, one token of
each running request; SGLang treats them all as prompts.
"""

from __future__ import annotations

import copy
from typing import Any

from fairkv_sglang.attention.forward_spans import ForwardSpans

PER_REQUEST = (
    "req_pool_indices",
    "req_pool_indices_cpu",
    "seq_lens",
    "seq_lens_cpu",
    "orig_seq_lens",
    "extend_prefix_lens",
    "extend_prefix_lens_cpu",
    "extend_seq_lens",
    "extend_seq_lens_cpu",
    "extend_start_loc",
    "multi_item_delimiter_indices",
)
"""Fields of SGLang's batch with an entry for each request that attention may read."""
PER_TOKEN = ("input_ids", "positions", "out_cache_loc", "out_cache_loc_virtual")
"""The same with an entry for each token."""


def prompts_only(forward_batch: Any, spans: ForwardSpans) -> Any:
    """The batch without its running requests."""
    requests, tokens = len(spans.prompts), spans.prompt_tokens
    batch = _cut(forward_batch, slice(0, requests), slice(0, tokens))
    batch.extend_num_tokens = tokens
    return batch


def running_only(forward_batch: Any, spans: ForwardSpans, decode: Any) -> Any:
    """The batch without its prompts, in SGLang's mode ``decode``."""
    requests, tokens = len(spans.prompts), spans.prompt_tokens
    end = requests + len(spans.decode_rows)
    batch = _cut(forward_batch, slice(requests, end), slice(tokens, tokens + end - requests))
    batch.forward_mode = decode
    return batch


def _cut(forward_batch: Any, requests: slice, tokens: slice) -> Any:
    batch = copy.copy(forward_batch)
    for names, part in ((PER_REQUEST, requests), (PER_TOKEN, tokens)):
        for name in names:
            values = getattr(forward_batch, name, None)
            if values is not None:
                setattr(batch, name, values[part])
    batch.batch_size = requests.stop - requests.start
    if getattr(batch, "global_num_token_non_padded_cpu", None) is not None:
        batch.global_num_token_non_padded_cpu = tokens.stop - tokens.start
    if batch.seq_lens_cpu is not None:
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
    return batch
