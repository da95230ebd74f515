# SPDX-License-Identifier: Apache-2.0
"""The ``fairkv`` attention backend of SGLang.

Prompts run on the backend that stock SGLang would use, on SGLang's own pool; when a prompt ends,
its kept tokens are handed over to head pages. Decode attends to head pages only. Heads are folded
into the batch there: a row of work is one (request, head) with its own page list and length.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from fairkv_sglang.attention.compress import PromptCompressor
from fairkv_sglang.attention.decoders import Decoder
from fairkv_sglang.attention.forward_spans import ForwardSpans
from fairkv_sglang.attention.mixed import prompts_only
from fairkv_sglang.kernels.prompts import to_device
from fairkv_sglang.memory.rows import RowBook
from fairkv_sglang.patches.overrides import overrides


class FairKVAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Composition of SGLang's prefill backend, the prompt compressor and a decode implementation.

    Args:
        runner: SGLang's model runner, with its pools.
        prefill: The attention backend that SGLang made for it.
        decoder: Decode over head pages.
        compressor: What becomes of prompts that end.
        book: Rows of this rank.

    Attributes:
        spans: Prompts of the pass that comes next or is running; set before each pass, because only
            SGLang's schedule batch knows them.
    """

    def __init__(
        self,
        runner: Any,
        prefill: AttentionBackend,
        decoder: Decoder,
        compressor: PromptCompressor,
        book: RowBook,
    ) -> None:
        super().__init__()
        self.prefill = prefill
        self.decoder = decoder
        self.compressor = compressor
        self.spans = ForwardSpans()
        self.req_to_token_pool = runner.req_to_token_pool  # SGLang reads both off the backend
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.device = runner.device
        self.pages, self.recent = book.pages, book.recent
        self.lane_start = book.heads.lane_start
        # Decode reads lengths of its page tables; what else SGLang asks of a backend is prefill's.
        self.needs_cpu_seq_lens = prefill.needs_cpu_seq_lens
        self.kv_index_translator = prefill.kv_index_translator
        self.data_type = prefill.data_type
        self.kv_cache_dtype = prefill.kv_cache_dtype
        self.extend_dummy_seqs_capped_by_req_pool = prefill.extend_dummy_seqs_capped_by_req_pool
        self._slots = torch.empty((0, self.pages.lanes), dtype=torch.int64)
        self._rows = torch.empty((0,), dtype=torch.int64)

    # -- metadata -------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare one pass (not captured)."""
        if forward_batch.forward_mode.is_decode_or_idle():
            self.init_forward_metadata_in_graph(forward_batch)
            return
        spans = self.spans
        if spans.decode_rows:
            self._start_decode(
                to_device(torch.tensor(spans.decode_rows), torch.device(self.device)),
                forward_batch.seq_lens[len(spans.prompts) :],
            )
            forward_batch = prompts_only(forward_batch, spans)
        self.prefill.init_forward_metadata(forward_batch)
        self.compressor.begin(spans, self.req_to_token_pool.req_to_token)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Host-side part of a captured pass: decode has none."""

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Device-side part: the next token's slots of all lanes, and the decode plan."""
        if forward_batch.forward_mode.is_decode():
            self._start_decode(forward_batch.req_pool_indices.long(), forward_batch.seq_lens)

    def _start_decode(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        pages = self.pages
        self._rows = rows
        self._slots = torch.empty(
            (rows.shape[0], pages.lanes), dtype=torch.int64, device=pages.device
        )
        pages.kernels.grow(pages, rows, self._slots)
        self.decoder.plan(rows)
        if self.recent is not None:
            self.recent.begin(rows, lengths)

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
        if self.spans.prompts:
            index = layer.layer_id
            tokens = k.shape[0]  # Gemma 3's queries are [1, tokens, heads, D]
            self.compressor.layer(
                index,
                q.view(tokens, layer.tp_k_head_num, -1, self.pages.head_dim),
                self.token_to_kv_pool.get_key_buffer(index),
                self.token_to_kv_pool.get_value_buffer(index),
                self.spans,
                layer.scaling,
            )
        return out

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append one token to the pages of each (request, lane) and attend to them."""
        index, heads = layer.layer_id, layer.tp_k_head_num
        lane = self.lane_start[index]
        batch, dim = self._rows.shape[0], self.pages.head_dim
        q = q.view(batch, -1, dim)
        if self.recent is not None:
            self.recent.add(lane, q.view(batch, heads, -1, dim))
        if save_kv_cache and k is not None:
            q = self.decoder.append(
                self._slots[:, lane : lane + heads],
                k.view(batch, heads, dim),
                v.view(batch, heads, dim),
                q,
            )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        more = {"sinks": sinks} if sinks is not None else {}
        self.decoder.decode(q, self._rows, index, heads, layer.scaling, out, **more)
        return out.view(batch, -1)


_RUNNER = "sglang.srt.model_executor.runner"

OVERRIDES = overrides(
    FairKVAttnBackend,
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
    {
        "init_forward_metadata": "a pass is prepared for SGLang's backend and for head pages",
        "init_forward_metadata_out_graph": "decode has no part outside of a CUDA graph",
        "init_forward_metadata_in_graph": "slots and plan of a decode step are made in the graph",
        "get_cuda_graph_seq_len_fill_value": "padded rows of a graph point at an empty row",
        "init_cuda_graph_state": "buffers for the largest captured batch",
        "forward_extend": "prompts are compressed after SGLang's attention",
        "forward_decode": "decode reads and writes head pages",
    },
    callers=(
        "sglang.srt.layers.attention.base_attn_backend",
        f"{_RUNNER}.eager_runner",
        f"{_RUNNER}.base_runner",
        f"{_RUNNER}.decode_cuda_graph_runner",
        "sglang.srt.model_executor.model_runner",
    ),
    since="0.5.20",
    test="tests/engine/test_serving.py",
)
