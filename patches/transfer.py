# SPDX-License-Identifier: Apache-2.0
"""FairKV's transfer backend among SGLang's for prefill-decode disaggregation."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import BaseKVBootstrapServer
from sglang.srt.disaggregation.utils import KVClassType, TransferBackend

from fairkv_sglang.patches import transfer_manager, transfer_requests
from fairkv_sglang.patches.ledger import Hook
from fairkv_sglang.refusals import TRANSFER_BACKEND


def register_transfer_backend() -> None:
    """Enter the backend into SGLang's enumeration of them; may be called again.

    SGLang has a seam for the name on the command line, but turns it into a member of this
    enumeration.
    """
    if TRANSFER_BACKEND not in TransferBackend._value2member_map_:
        member = object.__new__(TransferBackend)
        member._name_, member._value_ = TRANSFER_BACKEND.upper(), TRANSFER_BACKEND
        TransferBackend._value2member_map_[TRANSFER_BACKEND] = member


def around_get_kv_class(original: Any, transfer_backend: Any, class_type: Any) -> Any:
    """The classes of the backend that is asked for."""
    if transfer_backend.value != TRANSFER_BACKEND or class_type == KVClassType.KVARGS:
        return original(transfer_backend, class_type)
    return {
        KVClassType.MANAGER: transfer_manager.TransferManager,
        KVClassType.SENDER: transfer_requests.KeptRowsSender,
        KVClassType.RECEIVER: transfer_requests.KeptRowsReceiver,
        KVClassType.BOOTSTRAP_SERVER: NoBootstrapServer,
    }[class_type]


class NoBootstrapServer(BaseKVBootstrapServer):  # type: ignore[misc]
    """SGLang's servers register their ranks with one; here rank 0 of prefill answers itself."""

    def __init__(self, host: str, port: int) -> None:
        pass


GET_CLASS = Hook(
    target="sglang.srt.disaggregation.utils.get_kv_class",
    kind="around",
    function=around_get_kv_class,
    why="a decode server gets kept rows, which none of SGLang's transfer backends knows",
    since="0.5.17",
    upstream="sglang/srt/disaggregation/utils.py (a list of backends, without a seam)",
    test="tests/patches/test_disaggregation.py",
)

OVERRIDES = (*transfer_manager.OVERRIDES, *transfer_requests.OVERRIDES)
