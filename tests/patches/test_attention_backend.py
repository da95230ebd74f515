# SPDX-License-Identifier: Apache-2.0
"""The backend: prompts are SGLang's own backend's, decode reads and writes head pages alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

import fairkv_sglang.patches.rank
from fairkv_sglang.attention.decoders import PageTableDecoder
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.kernels import torch_decode
from fairkv_sglang.memory.recent import RecentQueries
from fairkv_sglang.patches import measure
from fairkv_sglang.patches.attention_backend import FairKVAttnBackend
from fairkv_tests.compress_cases import (
    DIM,
    LAYERS,
    SCALE,
    Model,
    Prompt,
    Rank,
    random_prompts,
    settle,
)
from fairkv_tests.core_cases import random_plan

MODEL = Model()


@pytest.fixture(autouse=True)
def _no_rank_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairkv_sglang.patches.rank, "_rank", None)


class Prefill(AttentionBackend):
    """SGLang's backend: writes K and V to the pool, remembers its calls."""

    needs_cpu_seq_lens = True
    extend_dummy_seqs_capped_by_req_pool = False

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.batches: list[Any] = []
        self.outputs: list[torch.Tensor] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.batches.append(forward_batch)

    def forward_extend(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        batch: Any,
        save_kv_cache: bool = True,
        **more: Any,
    ) -> torch.Tensor:
        assert more == {"sinks": None}
        if save_kv_cache:
            for pool, new in zip(self.pool.layers[layer.layer_id], (k, v), strict=True):
                pool[batch.out_cache_loc] = new.view(len(new), -1, DIM)
        self.outputs.append(torch.rand(q.shape))
        return self.outputs[-1]


class Pool:
    def __init__(self, rank: Rank) -> None:
        self.layers = rank.pools

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.layers[layer, 0]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.layers[layer, 1]


class Server:
    """One rank with its backend, driven as SGLang's model runner would."""

    def __init__(self, folder: Path) -> None:
        plan = random_plan(np.random.default_rng(3), LAYERS, 1, MODEL.heads)
        config = settle(folder, MODEL, plan, scope="layer", ratio=0.4, scorer="streaming")
        self.rank = Rank(config, MODEL, 1, 0, None)
        self.heads, self.book = self.rank.state.heads, self.rank.book
        pool = Pool(self.rank)
        self.prefill = Prefill(pool)
        runner = SimpleNamespace(
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=self.rank.table),
            token_to_kv_pool=pool,
        )
        decoder = PageTableDecoder(self.book.pages, self.heads.lane_start, torch_decode.decode)
        self.backend = FairKVAttnBackend(
            runner, self.prefill, decoder, self.rank.compressor, self.book
        )

    def extend(self, parts: list[tuple[Prompt, int, int]], running: list[int]) -> Any:
        """A pass over [start, end) of prompts, and a token of running rows: SGLang's batch."""
        spans, offset, slots = [], 0, []
        for prompt, start, end in parts:
            spans.append(PromptSpan(prompt.row, offset, end - start, end, prompt.length))
            offset += end - start
            slots.append(prompt.slots[start:end])
        self.backend.spans = current = ForwardSpans(tuple(spans), tuple(running))
        self.book.begin_forward([span.row for span in current.last])
        lengths = [span.length for span in spans] + [1] * len(running)
        rows = [span.row for span in spans] + running
        return SimpleNamespace(
            forward_mode=ForwardMode.MIXED if running else ForwardMode.EXTEND,
            batch_size=len(rows),
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor(lengths),
            seq_lens_cpu=torch.tensor(lengths),
            extend_seq_lens_cpu=lengths,
            input_ids=None,
            positions=torch.arange(sum(lengths)),
            out_cache_loc=torch.cat([*slots, torch.zeros(len(running), dtype=torch.int64)]),
        )

    def layer(self, index: int, heads: int) -> Any:
        return SimpleNamespace(layer_id=index, tp_k_head_num=heads, scaling=SCALE)

    def run_prompts(self, batch: Any, parts: list[tuple[Prompt, int, int]]) -> None:
        for index in range(LAYERS):
            q, k, v = (
                torch.cat([getattr(p, name)[index, a:b] for p, a, b in parts]).flatten(1)
                for name in "qkv"
            )
            out = self.backend.forward_extend(
                q, k, v, self.layer(index, MODEL.heads), batch, sinks=None
            )
            assert out is self.prefill.outputs[-1], "SGLang's own output, untouched"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def kept_of(server: Server, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pages, lanes = server.book.pages, server.heads.num_lanes
    return [torch_decode.gather(pages, row, lane) for lane in range(lanes)]


def test_a_prompt_is_sglangs_and_then_compressed(server: Server) -> None:
    (prompt,) = random_prompts(np.random.default_rng(0), ([20, 21],))
    server.rank.admit(prompt)
    for start, end in ((0, 20), (20, 41)):
        parts = [(prompt, start, end)]
        batch = server.extend(parts, [])
        server.backend.init_forward_metadata(batch)
        assert server.prefill.batches[-1] is batch
        assert server.book.pages.num_used == 0
        server.run_prompts(batch, parts)
    assert len(server.prefill.outputs) == 2 * LAYERS
    kept = [len(k) for k, _ in kept_of(server, prompt.row)]
    assert sum(kept) == LAYERS * MODEL.heads * -(-41 * 4 // 10)
    assert server.backend.compressor.hand_over.bytes_sent == 0


def test_stopwatches_run_where_they_are_asked_for(server: Server) -> None:
    """Plain code on the way of every server; timed only where it is measured."""
    before = dict(measure.seconds)
    for row, timed in ((0, False), (1, True)):
        if timed:
            measure.time_compression(server.backend.compressor)
        prompt = random_prompts(np.random.default_rng(row), ([30],))[0]
        server.rank.admit(prompt)
        batch = server.extend([(prompt, 0, 30)], [])
        server.backend.init_forward_metadata(batch)
        server.run_prompts(batch, [(prompt, 0, 30)])
        server.book.free(prompt.row)
        for name in ("compress_seconds", "hand_over_seconds"):
            assert (measure.seconds[name] > before[name]) == timed


def test_a_pass_without_a_plan_is_sglangs_alone(server: Server) -> None:
    """Warm-up and capture: no request of the scheduler's is in the batch."""
    batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND, out_cache_loc=torch.arange(4))
    server.backend.init_forward_metadata(batch)
    zeros = torch.zeros(4, MODEL.heads * MODEL.group * DIM)
    kv = torch.zeros(4, MODEL.heads * DIM)
    out = server.backend.forward_extend(
        zeros, kv, kv, server.layer(0, MODEL.heads), batch, sinks=None
    )
    assert out is server.prefill.outputs[-1]
    assert server.book.pages.num_used == 0


def decode(server: Server, batch: Any, rows: list[int], seed: int) -> None:
    """All layers of a decode pass against a softmax over the pages and the new token."""
    heads = server.heads
    make = torch.Generator().manual_seed(seed)
    for index in range(LAYERS):
        n, lane = len(heads.heads[index]), heads.lane_start[index]
        q = torch.randn((len(rows), n * MODEL.group * DIM), generator=make)
        k, v = torch.randn((2, len(rows), n * DIM), generator=make)
        before = {row: kept_of(server, row) for row in rows}
        out = server.backend.forward_decode(q, k, v, server.layer(index, n), batch)
        assert out.shape == q.shape
        for i, row in enumerate(rows):
            for head in range(n):
                keys, values = (
                    torch.cat([old[:-1], new.view(len(rows), n, DIM)[i, head][None]])
                    for old, new in zip(before[row][lane + head], (k, v), strict=True)
                )
                mine = q.view(len(rows), n, MODEL.group, DIM)[i, head]
                weights = (mine @ keys.T * SCALE).softmax(-1)
                found = out.view(len(rows), n, MODEL.group, DIM)[i, head]
                torch.testing.assert_close(found, weights @ values)


def decode_batch(rows: list[int], lengths: list[int]) -> Any:
    """SGLang's batch of a decode step; lengths with the new token."""
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=torch.tensor(rows, dtype=torch.int32),
        seq_lens=torch.tensor(lengths),
    )


def test_decode_reads_and_writes_head_pages(server: Server) -> None:
    prompts = random_prompts(np.random.default_rng(1), ([30], [41]))
    for prompt in prompts:
        server.rank.admit(prompt)
    parts = [(prompt, 0, prompt.length) for prompt in prompts]
    batch = server.extend(parts, [])
    server.backend.init_forward_metadata(batch)
    server.run_prompts(batch, parts)
    server.rank.pools.fill_(torch.nan)  # SGLang gave the slots to somebody else
    calls = len(server.prefill.batches)
    rows = [prompts[1].row, prompts[0].row]
    for step in range(3):
        lengths = [len(k) for k, _ in kept_of(server, rows[0])]
        batch = decode_batch(rows, [41 + step, 30 + step])
        server.backend.init_forward_metadata(batch)
        decode(server, batch, rows, step)
        assert [len(k) for k, _ in kept_of(server, rows[0])] == [n + 1 for n in lengths]
    assert len(server.prefill.batches) == calls  # SGLang's backend has no part in it


def test_a_mixed_batch(server: Server) -> None:
    """A prompt's last chunk beside a running request: each sees its own part only."""
    first, second = random_prompts(np.random.default_rng(2), ([30], [12, 29]))
    for prompt in (first, second):
        server.rank.admit(prompt)
    parts = [(first, 0, 30), (second, 0, 12)]
    batch = server.extend(parts, [])
    server.backend.init_forward_metadata(batch)
    server.run_prompts(batch, parts)
    parts = [(second, 12, 41)]
    batch = server.extend(parts, [first.row])
    server.backend.init_forward_metadata(batch)
    seen = server.prefill.batches[-1]
    assert seen.batch_size == 1 and seen.extend_seq_lens_cpu == [29]
    assert torch.equal(seen.out_cache_loc, second.slots[12:])
    server.run_prompts(seen, parts)
    decode(server, batch, [first.row], 5)
    assert sum(len(k) for k, _ in kept_of(server, second.row)) == LAYERS * 4 * -(-41 * 4 // 10)
    server.book.pages.check_integrity()


def test_queries_of_the_last_tokens_are_kept_where_outputs_are_compressed(server: Server) -> None:
    """By decode steps and by mixed passes alike, with the length that SGLang gives the row."""
    pages, heads, window = server.book.pages, server.heads, 4
    server.backend.recent = recent = RecentQueries(
        rows=pages.rows,
        window=window,
        lanes=heads.num_lanes,
        group=MODEL.group,
        head_dim=DIM,
        dtype=torch.float32,
        device=pages.device,
    )
    first, second = random_prompts(np.random.default_rng(2), ([30], [41]))
    server.rank.admit(first)
    batch = server.extend([(first, 0, 30)], [])
    server.backend.init_forward_metadata(batch)
    server.run_prompts(batch, [(first, 0, 30)])
    said = []
    for length in range(31, 38):
        batch = decode_batch([first.row], [length])
        if length == 35:
            server.rank.admit(second)
            batch = server.extend([(second, 0, 41)], [first.row])
            batch.seq_lens = torch.tensor([41, length])
        server.backend.init_forward_metadata(batch)
        queries = torch.randn(heads.num_lanes, MODEL.group, DIM)
        said.append(queries)
        for index in range(LAYERS):
            n, lane = len(heads.heads[index]), heads.lane_start[index]
            q, new = queries[lane : lane + n].reshape(1, -1), torch.zeros(1, n * DIM)
            server.backend.forward_decode(q, new, new, server.layer(index, n), batch)
    found = recent.last(first.row, 37, np.arange(heads.num_lanes))
    assert torch.equal(found, torch.stack(said[-window:], dim=1))


def test_an_idle_pass_touches_nothing(server: Server) -> None:
    server.backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE))
    assert not server.prefill.batches and server.book.pages.num_used == 0


def test_what_sglang_asks_of_a_backend(server: Server) -> None:
    assert server.backend.get_cuda_graph_seq_len_fill_value() == 1
    assert server.backend.needs_cpu_seq_lens is True
