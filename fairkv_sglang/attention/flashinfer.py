# SPDX-License-Identifier: Apache-2.0
"""FlashInfer on CUDA: prefill with uneven heads, folded decode over head pages.

Imported on CUDA only. See ``docs/gpu-results.md`` for what has run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from fairkv_sglang.runtime import FairKVRuntime

PREFILL_WORKSPACE_BYTES = 256 << 20


class FlashInferPrefill(AttentionBackend):  # type: ignore[misc]
    """Full attention on the prefill pool; layers differ in their number of heads.

    SGLang's own FlashInfer backend plans once for one head count. Here each distinct count of this
    rank's layers has a wrapper of its own, planned once per pass; page size 1 as in SGLang.

    Args:
        runner: SGLang's model runner.
        runtime: This rank.
    """

    def __init__(self, runner: Any, runtime: FairKVRuntime) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        super().__init__()
        self.runtime = runtime
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.dtype = runner.dtype
        device = runner.device
        workspace = torch.empty(PREFILL_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        counts = sorted({len(row) for row in runtime.heads.heads})
        self._wrappers = {
            count: BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
            for count in counts
        }

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan all wrappers for the pass."""
        rows = forward_batch.req_pool_indices
        device = rows.device
        seq_lens = forward_batch.seq_lens.to(torch.int32)
        extend_lens = forward_batch.extend_seq_lens.to(torch.int32)
        kv_indptr = torch.nn.functional.pad(torch.cumsum(seq_lens, 0, dtype=torch.int32), (1, 0))
        qo_indptr = torch.nn.functional.pad(torch.cumsum(extend_lens, 0, dtype=torch.int32), (1, 0))
        longest = int(forward_batch.seq_lens_cpu.max())
        table = self.req_to_token[rows, :longest]
        inside = torch.arange(longest, device=device)[None, :] < seq_lens[:, None]
        kv_indices = table[inside].to(torch.int32)
        last_page_len = torch.ones_like(seq_lens)
        shape = self.runtime.shape
        for count, wrapper in self._wrappers.items():
            wrapper.plan(
                qo_indptr,
                kv_indptr,
                kv_indices,
                last_page_len,
                count * shape.group_size,
                count,
                shape.head_dim,
                1,
                causal=True,
                q_data_type=self.dtype,
                kv_data_type=self.pool.dtype,
            )

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write K and V to the pool, then attend causally to the whole prompt so far."""
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        heads, width = layer.tp_q_head_num, layer.qk_head_dim
        out = self._wrappers[layer.tp_k_head_num].run(
            q.view(-1, heads, width).contiguous(),
            (
                self.pool.get_key_buffer(layer.layer_id)[:, None],
                self.pool.get_value_buffer(layer.layer_id)[:, None],
            ),
        )
        return out.view(-1, heads * width)
