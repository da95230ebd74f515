# SPDX-License-Identifier: Apache-2.0
"""The transfer backend under SGLang's protocol: both servers in one process, sockets between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.utils import (
    KVClassType,
    ReqToMetadataIdxAllocator,
    TransferBackend,
    get_kv_class,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from fairkv_sglang.patches import disaggregation, transfer, transfer_requests
from fairkv_sglang.patches.transfer_manager import ReachedServers, TransferManager
from fairkv_sglang.transfer.decode_end import DecodeEnd
from fairkv_sglang.transfer.prefill_end import PrefillEnd
from fairkv_sglang.transfer.rows import KeptRows, Moved, store
from fairkv_tests.core_cases import make_books, random_plan, random_scope

LAYERS, HEADS, DIM, LENGTH = 2, 3, 8, 400
AUX = [4, 16]  # bytes of a request in each metadata buffer


class Request:
    """What is read and set of SGLang's request."""

    def __init__(self, output: int) -> None:
        self.kv = SimpleNamespace(req_pool_idx=None, holds_kv=False)
        self.origin_input_ids, self.output_ids = [1] * LENGTH, []
        self.sampling_params = SimpleNamespace(max_new_tokens=output, custom_params=None)
        self.finished_reason: Any = None
        self.return_logprob = False
        self.time_stats = SimpleNamespace(set_decode_transfer_queue_entry_time=lambda: None)

    def set_extend_range(self, start: int, end: int) -> None:
        pass


class Side:
    """One of the two servers, with one rank."""

    def __init__(self, pages: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        plan = random_plan(rng, LAYERS, 1, HEADS)
        scope = random_scope(np.random.default_rng(5), "layer", LAYERS, HEADS)
        [self.book] = make_books(plan, scope, np.array([pages]))
        self.rank = SimpleNamespace(book=self.book, heads=self.book.heads, moved=Moved())
        self.manager = object.__new__(TransferManager)
        self.manager.agreed = {"budget": "a quarter"}
        self.buffers = [torch.zeros((4, size), dtype=torch.uint8) for size in AUX]
        self.manager.kv_args = SimpleNamespace(
            aux_data_ptrs=[buffer.data_ptr() for buffer in self.buffers], aux_item_lens=AUX
        )


MADE: list[Servers] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Sockets are closed with their test."""
    yield
    while MADE:
        servers = MADE.pop()
        servers.decode.manager.receives.shut()
        servers.prefill.manager.sends._socket.close(0)


class Servers:
    """A prefill server, and a decode server with the queue in which SGLang has its requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pages: int = 500) -> None:
        MADE.append(self)
        self.prefill, self.decode = Side(500, 1), Side(pages, 2)
        end = PrefillEnd("127.0.0.1", None, 60)
        end.about = {"ports": [end.port], "agreed": self.prefill.manager.agreed}
        self.prefill.manager.sends = end
        self.decode.manager.receives = receives = DecodeEnd(0, 1)
        self.decode.manager.prefill_info_table = ReachedServers(receives)
        self.address = f"127.0.0.1:{end.port}"
        self.now = self.prefill
        for module in (transfer_requests, disaggregation):
            monkeypatch.setattr(module, "this_rank", lambda: self.now.rank)
        table = ReqToTokenPool(7, LENGTH, "cpu", False)
        table.attach_aux_cache(self.decode.book)
        self.told: list[Any] = []
        streamer = SimpleNamespace(stream_output=lambda reqs, logprob: self.told.extend(reqs))
        self.queue = SimpleNamespace(
            scheduler=SimpleNamespace(
                enable_priority_scheduling=False,
                running_batch=SimpleNamespace(reqs=[]),
                waiting_queue=[],
                output_streamer=streamer,
            ),
            queue=[],
            pending_reqs=[],
            transfer_queue=SimpleNamespace(queue=[]),
            req_to_token_pool=table,
            req_to_metadata_buffer_idx_allocator=ReqToMetadataIdxAllocator(4),
            token_to_kv_pool_allocator=SimpleNamespace(page_size=1),
            num_reserved_decode_tokens=16,
            _num_published_destinations=0,
            _resolve_pending_reqs=lambda: None,
            _update_handshake_waiters=self.poll,
        )

    def request(self, room: int, output: int = 16) -> tuple[Any, Any]:
        """Sender and entry of a request that both servers have."""
        self.now = self.prefill
        sender = transfer_requests.KeptRowsSender(self.prefill.manager, self.address, room, [0], 0)
        assert sender.poll() == KVPoll.Bootstrapping
        sender.init(3, room % 4)
        self.now = self.decode
        receiver = transfer_requests.KeptRowsReceiver(self.decode.manager, self.address, room)
        entry = SimpleNamespace(req=Request(output), kv_receiver=receiver, waiting_for_input=False)
        self.queue.queue.append(entry)
        while not self.decode.manager.try_ensure_parallel_info(self.address):
            sender.poll()
        assert self.decode.manager.prefill_info_table.get(self.address).dp_size == 1
        receiver.init(0)
        return sender, entry

    def poll(self) -> None:
        for entry in self.queue.queue:
            entry.waiting_for_input = entry.kv_receiver.poll() == KVPoll.WaitingForInput

    def pop(self) -> tuple[list[Any], list[Any]]:
        """What SGLang does between two steps of the decode server."""
        self.now = self.decode
        admitted, failed = disaggregation.around_pop_preallocated(None, self.queue)
        self.queue.transfer_queue.queue += admitted
        return admitted, failed

    def until(self, poller: Any, state: int) -> None:
        """Poll a side until it is in this state."""
        self.now = self.prefill if hasattr(poller, "announce") else self.decode
        deadline = time.monotonic() + 10
        while poller.poll() != state:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def compress(self, sender: Any, row: int, kept: np.ndarray) -> KeptRows:
        """The prompt has run on the prefill server, its rows are in head pages."""
        self.now = self.prefill
        book = self.prefill.book
        values = torch.randn(2, int(kept.sum()), DIM)
        rows = KeptRows(np.argwhere(kept > 0), kept.ravel(), values[0], values[1])
        book.admission.promise(book.admission.ask_kept(LENGTH, kept))
        book.admit(row, LENGTH)
        book.note_kept(row, torch.from_numpy(kept))
        book.hand_over(row, 0)
        book.receive(row, lambda: store(book.pages, book.heads, row, rows))
        book.begin_forward([])
        buffers = SimpleNamespace(set_buf=lambda req: self.first_token(sender.index, row))
        disaggregation.around_send_kv_chunk(
            None,
            SimpleNamespace(disagg_metadata_buffers=buffers),
            SimpleNamespace(disagg_kv_sender=sender, kv=SimpleNamespace(req_pool_idx=row)),
            last_chunk=True,
        )
        return rows

    def first_token(self, index: int, value: int) -> None:
        for buffer in self.prefill.buffers:
            buffer[index] = value


def test_sglang_takes_the_backend() -> None:
    """Its name is a member of SGLang's enumeration, its classes are those of the ledger."""
    transfer.register_transfer_backend()
    backend = TransferBackend("fairkv")
    assert backend not in list(TransferBackend) and backend is TransferBackend("fairkv")
    for kind in KVClassType:
        found = transfer.around_get_kv_class(get_kv_class, backend, kind)
        ours = found.__module__.startswith("fairkv_sglang")
        assert ours == (kind != KVClassType.KVARGS)
        fake = transfer.around_get_kv_class(get_kv_class, TransferBackend.FAKE, kind)
        assert fake is get_kv_class(TransferBackend.FAKE, kind)


def test_a_request_goes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, owners, rows and first token; charged on the decode side is what comes."""
    servers = Servers(monkeypatch)
    kept = np.array([[40, 17, 1], [100, 16, 33]])
    sender, entry = servers.request(6)
    servers.until(sender, KVPoll.WaitingForInput)
    assert entry.kv_receiver.poll() == KVPoll.Bootstrapping and servers.pop() == ([], [])

    rows = servers.compress(sender, 3, kept)
    servers.until(entry.kv_receiver, KVPoll.WaitingForInput)
    assert servers.pop() == ([entry], [])
    row = entry.req.kv.req_pool_idx
    pages = int((-(-kept // 16)).sum())
    assert servers.decode.book.ledger.held.tolist() == [pages]
    assert servers.decode.book.pages.num_used == 0
    servers.until(sender, KVPoll.Success)
    servers.until(entry.kv_receiver, KVPoll.Success)
    assert sender.get_transfer_metric().transfer_total_bytes == rows.bytes
    assert servers.prefill.rank.moved == servers.decode.rank.moved == Moved(1, rows.bytes)
    for here, there in zip(servers.decode.buffers, servers.prefill.buffers, strict=True):
        assert torch.equal(here[entry.metadata_buffer_index], there[sender.index])
        assert here[entry.metadata_buffer_index].all()

    book = servers.decode.book
    book.begin_forward([])
    assert book.pages.num_used == pages
    lens = book.pages.lens[row].numpy()
    assert (lens == kept[book.heads.lane_layer, book.heads.lane_head]).all()
    entry.kv_receiver.clear()
    sender.clear()
    book.free(row)
    assert book.check_idle() == []


def test_requests_wait_for_pages_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller one that has come later does not overtake."""
    servers = Servers(monkeypatch, pages=80)
    large, small = np.full((LAYERS, HEADS), 160), np.full((LAYERS, HEADS), 16)  # 60 and 6 pages
    pairs = [servers.request(room) for room in range(3)]
    for row, ((sender, entry), kept) in enumerate(zip(pairs, (large, large, small), strict=True)):
        servers.until(sender, KVPoll.WaitingForInput)
        servers.compress(sender, row + 1, kept)
        servers.until(entry.kv_receiver, KVPoll.WaitingForInput)
    [first, second, third] = [entry for _, entry in pairs]
    assert servers.pop() == ([first], []) and servers.pop() == ([], [])
    servers.queue.transfer_queue.queue.clear()
    servers.decode.book.free(first.req.kv.req_pool_idx)
    assert servers.pop() == ([second, third], [])


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_aborted_request_leaves_nothing(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Servers(monkeypatch)
    sender, entry = servers.request(6)
    servers.until(sender, KVPoll.WaitingForInput)
    (sender if side == "prefill" else entry.kv_receiver).abort()
    servers.until(sender, KVPoll.Failed)
    servers.until(entry.kv_receiver, KVPoll.Failed)
    for poller in (sender, entry.kv_receiver):
        with pytest.raises(RuntimeError, match="aborted"):
            poller.failure_exception()
    entry.req.finished_reason = FINISH_ABORT("as SGLang has it")
    servers.queue.pending_reqs.append(entry)
    assert servers.pop() == ([], [entry])
    assert servers.told == [entry.req] and servers.queue.queue == servers.queue.pending_reqs == []
    assert entry.kv_receiver is None


def test_a_server_that_was_given_something_else_fails_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = Servers(monkeypatch)
    servers.decode.manager.agreed = {"budget": "a half"}
    sender, entry = servers.request(6)
    line = "budget 'a half' instead of 'a quarter'"
    for poller in (entry.kv_receiver, sender):
        servers.until(poller, KVPoll.Failed)
        with pytest.raises(RuntimeError, match=line):
            poller.failure_exception()
