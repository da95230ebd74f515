# SPDX-License-Identifier: Apache-2.0
"""Messages between the ranks of a prefill and of a decode server: a kind, a JSON header, arrays.

In the order of a request: `who` and `about` (once for a server), `hello` (a decode rank waits for a
room, SGLang's word for a request that two servers share), `kept` (counts), `pull` (owners), `rows`;
at any time `fail`. `ping` is for finding out who is gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import zmq
from numpy.typing import NDArray

from fairkv_sglang.transfer.rows import KeptRows


class WireError(ValueError):
    """A message that nobody of FairKV's has sent."""


def make_socket(kind: int) -> zmq.Socket[bytes]:
    """A socket of this kind without limits on what is queued: no message is lost while both ends
    live, and none is waited for when one closes. A peer whose machine dies is noticed in 12 s.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    for option, value in (
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, 0),
        (zmq.LINGER, 0),
        (zmq.HEARTBEAT_IVL, 2000),  # milliseconds
        (zmq.HEARTBEAT_TIMEOUT, 10000),
    ):
        socket.setsockopt(option, value)
    return socket


def pack(kind: str, header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> list[bytes]:
    """Frames of a message."""
    return [kind.encode(), json.dumps(header).encode(), *parts]


def unpack(frames: Sequence[bytes]) -> tuple[str, dict[str, Any], list[bytes]]:
    """Kind, header and parts of a message.

    Raises:
        WireError: if it is none.
    """
    try:
        kind, header = frames[0].decode("ascii"), json.loads(frames[1])
    except (IndexError, ValueError) as error:
        raise WireError(f"no message of FairKV's ({error})") from None
    if not isinstance(header, dict):
        raise WireError("a header that is no object")
    return kind, header, list(frames[2:])


def pack_array(values: NDArray[np.integer]) -> tuple[dict[str, Any], bytes]:
    """Header and part of an array of integers."""
    wide = np.ascontiguousarray(values, dtype=np.int64)
    return {"shape": list(wide.shape)}, wide.tobytes()


def unpack_array(header: Mapping[str, Any], part: bytes) -> NDArray[np.int64]:
    """The array. Raises WireError if it has another size than it says."""
    try:
        return np.frombuffer(part, dtype=np.int64).reshape(header["shape"]).copy()
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"no array ({error})") from None


def pack_rows(rows: KeptRows) -> tuple[dict[str, Any], list[bytes]]:
    """Header and four parts of kept rows."""
    parts = [rows.heads.tobytes(), rows.counts.tobytes(), *map(_bytes, (rows.k, rows.v))]
    name = str(rows.k.dtype).removeprefix("torch.")
    return {"dtype": name, "dim": rows.k.shape[1]}, parts


def unpack_rows(header: Mapping[str, Any], parts: Sequence[bytes]) -> KeptRows:
    """Kept rows. Raises WireError if sizes do not fit together."""
    try:
        heads, counts = (np.frombuffer(part, dtype=np.int64).copy() for part in parts[:2])
        dtype, dim = getattr(torch, header["dtype"]), int(header["dim"])
        k, v = (_tensor(part, dtype).view(int(counts.sum()), dim) for part in parts[2:])
        return KeptRows(heads.reshape(len(counts), 2), counts, k, v)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WireError(f"no kept rows ({error})") from None


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _tensor(part: bytes, dtype: torch.dtype) -> torch.Tensor:
    if not part:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(part), dtype=dtype)
