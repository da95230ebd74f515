# SPDX-License-Identifier: Apache-2.0
"""A rank's end of the transfer of kept rows, as SGLang's disaggregation knows it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from sglang.srt.disaggregation.base.conn import BaseKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs

from fairkv_sglang.patches.overrides import overrides
from fairkv_sglang.patches.rank import this_rank
from fairkv_sglang.transfer.agreement import to_agree
from fairkv_sglang.transfer.decode_end import DecodeEnd
from fairkv_sglang.transfer.prefill_end import PrefillEnd


class ReachedServers:
    """What SGLang looks up of prefill servers: those that have been reached, each one replica."""

    dp_size = 1

    def __init__(self, end: DecodeEnd) -> None:
        self._end = end

    def get(self, address: str) -> ReachedServers | None:
        return self if self._end.about(address) is not None else None


class TransferManager(BaseKVManager):  # type: ignore[misc]
    """This rank's end of the transfer.

    Attributes:
        sends: The end of a prefill server.
        receives: That of a decode server. Each rank has one of the two.
        agreed: What both servers must have been given alike.
    """

    sends: PrefillEnd
    receives: DecodeEnd

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: Any = False
    ) -> None:
        from sglang.srt.distributed import get_tp_group
        from sglang.srt.runtime_context import get_disagg, get_serving

        self.kv_args = args
        rank = this_rank()
        self.agreed = to_agree(rank.start, rank.book.pages.dtype)
        mine = rank.heads.rank
        if disaggregation_mode == DisaggregationMode.DECODE:
            self.receives = DecodeEnd(mine, rank.tp_size)
            self.prefill_info_table = ReachedServers(self.receives)
            return
        wait = envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get()
        port = get_disagg().disaggregation_bootstrap_port if mine == 0 else None
        self.sends = PrefillEnd(get_serving().host, port, wait)
        ports: list[Any] = [self.sends.port]
        if rank.tp_size > 1:
            ports = [None] * rank.tp_size
            torch.distributed.all_gather_object(
                ports, self.sends.port, group=get_tp_group().cpu_group
            )
        self.sends.about = {"ports": ports, "agreed": self.agreed}

    def register_to_bootstrap(self) -> None:
        """Nothing: who asks rank 0 is told where the others listen."""

    def try_ensure_parallel_info(self, address: str) -> bool:
        """Whether the prefill server at ``host:port`` has answered."""
        return self.receives.reach(address)

    def first_token(self, index: int) -> list[bytes]:
        """What SGLang hands over beside the KV: the first token, its log probabilities and so on.

        Args:
            index: The request's place in SGLang's metadata buffers.
        """
        pairs = zip(self.kv_args.aux_data_ptrs, self.kv_args.aux_item_lens, strict=True)
        return [ctypes.string_at(start + index * size, size) for start, size in pairs]

    def put_first_token(self, index: int, parts: list[bytes]) -> None:
        """The same on the other side.

        Raises:
            ValueError: if the other side has other buffers.
        """
        sizes = self.kv_args.aux_item_lens
        if [len(part) for part in parts] != list(sizes):
            raise ValueError("the servers are of SGLang releases with other metadata")
        for start, size, part in zip(self.kv_args.aux_data_ptrs, sizes, parts, strict=True):
            ctypes.memmove(start + index * size, part, size)


_OF_MANAGERS = overrides(
    TransferManager,
    None,
    {"try_ensure_parallel_info": "rank 0 of the prefill server answers for it"},
    callers=("sglang.srt.disaggregation.decode",),
    since="0.5.17",
    test="tests/patches/test_disaggregation.py",
    receiver="kv_manager",
)
OVERRIDES = (
    *_OF_MANAGERS,
    *overrides(
        TransferManager,
        "sglang.srt.disaggregation.base.conn.BaseKVManager",
        {"register_to_bootstrap": "there is no bootstrap server to register with"},
        since="0.5.17",
        test="tests/patches/test_disaggregation.py",
    ),
)
