# SPDX-License-Identifier: Apache-2.0
"""The ``fairkv`` attention backend of SGLang.

Prefill attends to the full prompt in SGLang's own pool; decode attends to head pages only. Heads
are folded into the batch: a row of work is one (request, head) with its own page list and length.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from fairkv_sglang.attention.compress import PromptCompressor
from fairkv_sglang.attention.decoders import Decoder
from fairkv_sglang.attention.forward_plan import ForwardPlan
from fairkv_sglang.kernels import ops
from fairkv_sglang.runtime import FairKVRuntime


class FairKVAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Composition of a prefill backend, the prompt compressor and a decode implementation.

    Args:
        runner: SGLang's model runner, with its pools.
        prefill: SGLang attention backend that serves extend batches of uneven heads.
        decoder: Decode over head pages.
        runtime: This rank.
        device_group: Process group of the ranks; None at TP 1.
    """

    # Lengths of compressed rows live in the page tables; SGLang's are logical.
    needs_cpu_seq_lens = False

    def __init__(
        self,
        runner: Any,
        prefill: AttentionBackend,
        decoder: Decoder,
        runtime: FairKVRuntime,
        device_group: torch.distributed.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.prefill = prefill
        self.decoder = decoder
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.device = runner.device
        self.compressor = PromptCompressor(runtime, device_group)
        self.copied_layers = runtime.heads.layers_with_copies()
        self.head_dim = runtime.shape.head_dim
        self._slots = torch.empty((0, runtime.heads.num_lanes), dtype=torch.int64)
        self._rows = torch.empty((0,), dtype=torch.int64)
        self._plan = ForwardPlan()
        self._prefill_batch: Any = None
        self._extend_started = 0.0

    # -- metadata -------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare one pass (not captured)."""
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Host-side part: only prefill has one."""
        if forward_batch.forward_mode.is_decode_or_idle():
            return
        self._extend_started = time.perf_counter()
        self._plan = self.runtime.forward_plan or ForwardPlan()
        self._prefill_batch = None
        if self._plan.decode_rows:
            self._prefill_batch = self._prompts_only(forward_batch)
            self._start_decode(torch.tensor(self._plan.decode_rows).to(self.device))
        self.prefill.init_forward_metadata(self._prefill_batch or forward_batch)
        if self._plan.spans and self.copied_layers and self._plan.shared_mask is None:
            self._plan.shared_mask = self._share_mask()
        self.compressor.begin(self._plan, self.req_to_token)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Device-side part: the next token's slots of all lanes, and the decode plan."""
        if not forward_batch.forward_mode.is_decode():
            return
        self._start_decode(forward_batch.req_pool_indices.long())

    def _start_decode(self, rows: torch.Tensor) -> None:
        pages = self.runtime.book.pages
        self._rows = rows
        self._slots = torch.empty(
            (rows.shape[0], pages.lanes), dtype=torch.int64, device=pages.device
        )
        ops.grow(pages, rows, self._slots)
        self.decoder.plan(pages, rows)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padded rows point at row 0, which owns no lane."""
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers of the largest captured batch."""
        self.decoder.reserve(self.runtime.book.pages, max_bs)

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
        """Full attention on the uncompressed prompt, then compression of prompts that end here."""
        if self._prefill_batch is None:
            return self._forward_prompts(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        cut = self._plan.prompt_tokens
        prompts = self._forward_prompts(
            q[:cut], k[:cut], v[:cut], layer, self._prefill_batch, save_kv_cache, **kwargs
        )
        running = self.forward_decode(q[cut:], k[cut:], v[cut:], layer, forward_batch)
        return torch.cat([prompts, running])

    def _forward_prompts(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        **kwargs: Any,
    ) -> torch.Tensor:
        out = self.prefill.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        plan = self._plan
        if not plan.spans:
            return out
        index, heads = layer.layer_id, layer.tp_k_head_num
        started = time.perf_counter()
        self.compressor.layer(
            index,
            q.view(q.shape[0], heads, -1, self.head_dim),
            self.pool.get_key_buffer(index),
            self.pool.get_value_buffer(index),
            plan,
            layer.scaling,
        )
        now = time.perf_counter()
        self.runtime.compress_seconds += now - started
        if index == self.runtime.plan.num_layers - 1:
            self.runtime.prefill_seconds += now - self._extend_started
        if index in self.copied_layers and plan.shared_mask is not None:
            lane = self.runtime.heads.lane_start[index]
            mask = plan.shared_mask[:, lane : lane + heads, None, None]
            # Another rank adds the output of these heads: exact zeros from this one.
            view = out[: mask.shape[0]].view(mask.shape[0], heads, -1, self.head_dim)
            view.masked_fill_(mask == 0, 0)
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
        """Append one token to the pages of each (request, head) and attend to them."""
        index, heads = layer.layer_id, layer.tp_k_head_num
        lane = self.runtime.heads.lane_start[index]
        pages = self.runtime.book.pages
        batch = q.shape[0]
        if save_kv_cache and k is not None:
            ops.append(
                pages,
                self._slots[:, lane : lane + heads],
                k.view(batch, heads, self.head_dim),
                v.view(batch, heads, self.head_dim),
            )
        q = q.view(batch, -1, self.head_dim)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.decoder.decode(pages, q, self._rows, index, layer.scaling, out)
        return out.view(batch, -1)

    def support_triton(self) -> bool:
        """Whether SGLang may use Triton for its own index writes."""
        return bool(self.device != "cpu")

    def _share_mask(self) -> torch.Tensor:
        """``uint8 [prompt tokens, lanes]``: 1 where this rank serves the token's request and lane.

        Padding that SGLang may add behind the prompts is read by nobody.
        """
        book, spans = self.runtime.book, self._plan.spans
        masks = torch.stack([book.owned_mask(span.row) for span in spans])
        lengths = torch.tensor([span.length for span in spans])
        return masks.repeat_interleave(lengths, dim=0).to(self.device, non_blocking=True)

    def _prompts_only(self, forward_batch: Any) -> Any:
        """A mixed batch without its running requests; they need no attention to the pool."""
        batch = copy.copy(forward_batch)
        requests, tokens = len(self._plan.spans), self._plan.prompt_tokens
        for name in (
            "req_pool_indices",
            "seq_lens",
            "seq_lens_cpu",
            "extend_prefix_lens",
            "extend_seq_lens",
        ):
            setattr(batch, name, getattr(forward_batch, name)[:requests])
        batch.out_cache_loc = forward_batch.out_cache_loc[:tokens]
        return batch
