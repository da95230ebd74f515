# SPDX-License-Identifier: Apache-2.0
"""A request whose kept rows go from a prefill to a decode server, on either side.

SGLang's backends move pages of its own pool, whose places decode reserves before prefill begins.
Here a decode server learns what a prompt keeps when it is compressed, admits it by that, and then
asks for the rows. SGLang only sees the states of its own protocol: on the prefill side
*bootstrapping* until the decode server waits for the room, on the decode side until the counts have
come, so that prefill begins without a reservation and decode reserves afterwards.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from sglang.srt.disaggregation.base.conn import (
    BaseKVReceiver,
    BaseKVSender,
    KVPoll,
    KVTransferMetric,
)

from fairkv_sglang.patches.overrides import overrides
from fairkv_sglang.patches.rank import this_rank
from fairkv_sglang.patches.transfer_manager import TransferManager
from fairkv_sglang.refusals import TRANSFER_BACKEND
from fairkv_sglang.transfer.agreement import difference
from fairkv_sglang.transfer.rows import gather, store

_ABORTED = "aborted"


class KeptRowsSender(BaseKVSender):  # type: ignore[misc]
    """A request on the prefill side."""

    def __init__(
        self, mgr: TransferManager, bootstrap_addr: str, bootstrap_room: int, *_: Any, **__: Any
    ) -> None:
        self.kv_mgr, self.room = mgr, bootstrap_room
        self.index = -1  # in SGLang's metadata buffers
        self.row: int | None = None  # once its prompt is compressed
        self._bytes = 0
        mgr.sends.open(bootstrap_room)

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """Remember the request's place in the metadata buffers."""
        self.index = -1 if aux_index is None else aux_index

    def send(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Pages of SGLang's pool.

        Raises:
            RuntimeError: always; ``around_send_kv_chunk`` comes before.
        """
        raise RuntimeError("FairKV: pages of SGLang's pool were to be sent")

    def announce(self, row: int) -> None:
        """The prompt of ``row`` is compressed: tell the decode server what it keeps."""
        self.row = row
        self.kv_mgr.sends.tell_kept(self.room, this_rank().book.kept(row))

    def poll(self) -> int:
        """State of the request; rows that were asked for are sent here."""
        end = self.kv_mgr.sends
        end.pump()
        if end.failure(self.room) is not None:
            return int(KVPoll.Failed)
        if self.row is None:
            met = end.is_met(self.room)
            return int(KVPoll.WaitingForInput if met else KVPoll.Bootstrapping)
        self._serve(self.row)
        if not end.is_served(self.room):
            return int(KVPoll.Transferring)
        return int(KVPoll.Success)

    def _serve(self, row: int) -> None:
        end, rank = self.kv_mgr.sends, this_rank()
        book, heads = rank.book, rank.heads
        asked = end.asked(self.room)
        for receiver, owners in asked:
            wanted = (owners == receiver) & (book.owners(row) == heads.rank)
            rows = gather(book.pages, heads, row, wanted, book.kept(row))
            extra = self.kv_mgr.first_token(self.index) if heads.rank == 0 else []
            end.send_rows(self.room, receiver, rows, extra)
            self._bytes += rows.bytes
            rank.moved.bytes += rows.bytes
        if asked and end.is_served(self.room):
            rank.moved.prompts += 1

    def get_transfer_metric(self) -> KVTransferMetric:
        """Bytes of the rows that were sent."""
        return KVTransferMetric(transfer_total_bytes=self._bytes)

    def failure_exception(self) -> NoReturn:
        """Raises RuntimeError: why it failed."""
        raise RuntimeError(self.kv_mgr.sends.failure(self.room) or "another rank failed")

    def abort(self) -> None:
        """The request was aborted here."""
        self.kv_mgr.sends.fail(self.room, _ABORTED)

    def clear(self) -> None:
        """The request has ended."""
        self.kv_mgr.sends.close(self.room)


class KeptRowsReceiver(BaseKVReceiver):  # type: ignore[misc]
    """A request on the decode side.

    Attributes:
        kept: ``[L, H]`` tokens that its prompt keeps, once that is known.
    """

    abort_notified = True  # whoever fails a room tells the other side at once
    require_staging = False

    def __init__(
        self, mgr: TransferManager, bootstrap_addr: str, bootstrap_room: int | None = None
    ) -> None:
        self.kv_mgr, self.address, self.room = mgr, bootstrap_addr, int(bootstrap_room or 0)
        self.kept: NDArray[np.int64] | None = None
        self._place: tuple[int, int] | None = None  # row and index in the metadata buffers
        self._done = False
        self._met = False
        mgr.receives.open(self.room, bootstrap_addr)

    def init(self, prefill_dp_rank: int) -> None:
        """The prefill server has been reached: wait for the rows, if it was given the same."""
        end = self.kv_mgr.receives
        end.hello(self.room)
        self._met = True
        about = end.about(self.address)
        wrong = about and difference(about["agreed"], self.kv_mgr.agreed, self.address)
        if wrong:
            end.fail(self.room, wrong)

    def send_metadata(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Places in SGLang's pool.

        Raises:
            RuntimeError: always; ``around_pop_preallocated`` comes before.
        """
        raise RuntimeError("FairKV: places in SGLang's pool were to be told")

    def pull(self, row: int, index: int) -> None:
        """The request has its row and its pages: ask for what goes there.

        Args:
            row: Request-table row.
            index: The request's place in the metadata buffers.
        """
        self._place = row, index
        self.kv_mgr.receives.pull(self.room, this_rank().book.owners(row))

    def poll(self) -> int:
        """State of the request; rows that have come are taken here."""
        end = self.kv_mgr.receives
        end.pump()
        if end.failure(self.room) is not None:
            return int(KVPoll.Failed)
        if self.kept is None:
            self.kept = end.kept(self.room)
        if self._place is None:
            known = self.kept is not None
            return int(KVPoll.WaitingForInput if known else KVPoll.Bootstrapping)
        if not self._done:
            self._take(*self._place)
        return int(KVPoll.Success if self._done else KVPoll.Transferring)

    def _take(self, row: int, index: int) -> None:
        end, rank = self.kv_mgr.receives, this_rank()
        come = end.rows(self.room)
        if come is None:
            return
        parts, extra = come
        book = rank.book

        def store_all() -> None:
            for part in parts:
                store(book.pages, rank.heads, row, part)

        try:
            self.kv_mgr.put_first_token(index, extra)
        except ValueError as error:
            end.fail(self.room, str(error))
            return
        book.receive(row, store_all)
        rank.moved.add(parts)
        self._done = True

    def failure_exception(self) -> NoReturn:
        """Raises RuntimeError: why it failed."""
        raise RuntimeError(self.kv_mgr.receives.failure(self.room) or "another rank failed")

    def abort(self) -> None:
        """The request was aborted here, or its prefill server never answered."""
        lost = (
            f"no prefill server with --fairkv and --disaggregation-transfer-backend "
            f"{TRANSFER_BACKEND} answers at {self.address}"
        )
        self.kv_mgr.receives.fail(self.room, _ABORTED if self._met else lost)

    def ensure_abort_notified(self, **_: Any) -> None:
        """Nothing: see ``abort_notified``."""

    def clear(self) -> None:
        """The request decodes, or has ended."""
        self.kv_mgr.receives.close(self.room)


_BASE = "sglang.srt.disaggregation.base.conn"
_DECODE = "sglang.srt.disaggregation.decode"
_TEST = "tests/patches/test_disaggregation.py"
_UTILS = "sglang.srt.disaggregation.utils"

OVERRIDES = (
    *overrides(
        KeptRowsSender,
        f"{_BASE}.BaseKVSender",
        {
            "init": "the place of the first token in SGLang's buffers",
            "send": "rows are sent when a decode rank asks for them, not chunk by chunk",
            "poll": "prefill begins when decode waits, and ends when all rows have gone",
            "failure_exception": "the other side's reason is given",
            "abort": "the decode server frees what it holds for the request",
            "clear": "the room is forgotten",
            "get_transfer_metric": "bytes of kept rows",
        },
        callers=("sglang.srt.disaggregation.prefill", _UTILS),
        since="0.5.17",
        test=_TEST,
    ),
    *overrides(
        KeptRowsReceiver,
        f"{_BASE}.BaseKVReceiver",
        {
            "init": "what both servers were given is compared",
            "send_metadata": "owners ask for their rows when the request is admitted",
            "poll": "a request is admitted when its counts have come, decodes when its rows have",
            "failure_exception": "the other side's reason is given",
            "abort": "the prefill server frees what it holds for the request",
            "clear": "the room is forgotten",
        },
        callers=(_DECODE, _UTILS),
        since="0.5.17",
        test=_TEST,
    ),
)
