# SPDX-License-Identifier: Apache-2.0
"""The ``fairkv`` attention backend of SGLang.

Prompts run on the backend that stock SGLang would use, on SGLang's own pool; when a prompt ends,
its kept tokens are handed over to head pages. Decode attends to head pages only. Heads are folded
into the batch there: a row of work is one (request, head) with its own page list and length.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from fairkv_sglang.attention.compress_all import make_compressor
from fairkv_sglang.attention.decoders import Decoder
from fairkv_sglang.attention.forward_plan import ForwardPlan
from fairkv_sglang.attention.mixed import prompts_only
from fairkv_sglang.attention.warm_up import warm_up
from fairkv_sglang.kernels.prompts import to_device
from fairkv_sglang.runtime import FairKVRuntime


class FairKVAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Composition of SGLang's prefill backend, the prompt compressor and a decode implementation.

    Args:
        runner: SGLang's model runner, with its pools.
        prefill: The attention backend that SGLang made for it.
        decoder: Decode over head pages.
        runtime: This rank.
        device_group: Process group of the ranks; None at TP 1.
        transfer_group: Group of the hand-over, see :func:`make_compressor`.
    """

    def __init__(
        self,
        runner: Any,
        prefill: AttentionBackend,
        decoder: Decoder,
        runtime: FairKVRuntime,
        device_group: torch.distributed.ProcessGroup | None,
        transfer_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.runtime = runtime
        runtime.prefill_backend = type(prefill).__name__
        self.prefill = prefill
        self.decoder = decoder
        self.req_to_token_pool = runner.req_to_token_pool  # SGLang reads both off the backend
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.device = runner.device
        lane_start, group = runtime.heads.lane_start, runtime.model.group_size
        warm_up(runtime.book.pages, decoder, runtime.scorer, lane_start, group)
        self.compressor = make_compressor(runtime, device_group, transfer_group)
        self.head_dim = runtime.model.head_dim
        # Decode reads lengths of its page tables; what else SGLang asks of a backend is prefill's.
        self.needs_cpu_seq_lens = prefill.needs_cpu_seq_lens
        self.kv_index_translator = prefill.kv_index_translator
        self.data_type = prefill.data_type
        self.kv_cache_dtype = prefill.kv_cache_dtype
        self.extend_dummy_seqs_capped_by_req_pool = prefill.extend_dummy_seqs_capped_by_req_pool
        self._slots = torch.empty((0, runtime.heads.num_lanes), dtype=torch.int64)
        self._rows = torch.empty((0,), dtype=torch.int64)
        self._plan = ForwardPlan()
        self._extend_started = 0.0

    # -- metadata -------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare one pass (not captured)."""
        if forward_batch.forward_mode.is_decode_or_idle():
            self.init_forward_metadata_in_graph(forward_batch)
            return
        self._extend_started = time.perf_counter()
        self._plan = plan = self.runtime.forward_plan or ForwardPlan()
        if plan.decode_rows:
            self._start_decode(to_device(torch.tensor(plan.decode_rows), torch.device(self.device)))
            forward_batch = prompts_only(forward_batch, plan)
        self.prefill.init_forward_metadata(forward_batch)
        self.compressor.begin(plan, self.req_to_token_pool.req_to_token)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Host-side part of a captured pass: decode has none."""

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Device-side part: the next token's slots of all lanes, and the decode plan."""
        if forward_batch.forward_mode.is_decode():
            self._start_decode(forward_batch.req_pool_indices.long())

    def _start_decode(self, rows: torch.Tensor) -> None:
        pages = self.runtime.book.pages
        self._rows = rows
        self._slots = torch.empty(
            (rows.shape[0], pages.lanes), dtype=torch.int64, device=pages.device
        )
        pages.kernels.grow(pages, rows, self._slots)
        self.decoder.plan(rows)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padded rows point at row 0, which owns no lane."""
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers of the largest captured batch; only decode is captured."""
        self.decoder.reserve(max_bs)

    # -- attention ------------------------------------------------------------------------------

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
        """SGLang's own attention to the whole prompt, then compression of prompts that end here."""
        out = self.prefill.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        plan = self._plan
        if not plan.spans:
            return out
        index = layer.layer_id
        started = time.perf_counter()
        self.compressor.layer(
            index,
            q.view(q.shape[0], layer.tp_k_head_num, -1, self.head_dim),
            self.token_to_kv_pool.get_key_buffer(index),
            self.token_to_kv_pool.get_value_buffer(index),
            plan,
            layer.scaling,
        )
        now = time.perf_counter()
        self.runtime.compress_seconds += now - started
        if index == self.runtime.plan.num_layers - 1:
            hand_over = self.compressor.hand_over
            self.runtime.hand_over_seconds = hand_over.seconds
            self.runtime.hand_over_bytes = hand_over.rows_sent * hand_over.row_bytes
            self.runtime.prefill_seconds += now - self._extend_started
        return out

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append one token to the pages of each (request, lane) and attend to them."""
        index, heads = layer.layer_id, layer.tp_k_head_num
        lane = self.runtime.heads.lane_start[index]
        batch = q.shape[0]
        q = q.view(batch, -1, self.head_dim)
        if save_kv_cache and k is not None:
            q = self.decoder.append(
                self._slots[:, lane : lane + heads],
                k.view(batch, heads, self.head_dim),
                v.view(batch, heads, self.head_dim),
                q,
            )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.decoder.decode(q, self._rows, index, heads, layer.scaling, out)
        return out.view(batch, -1)

    def support_triton(self) -> bool:
        """Whether SGLang may use Triton for its own index writes."""
        return bool(self.device != "cpu")
