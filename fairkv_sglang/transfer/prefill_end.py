# SPDX-License-Identifier: Apache-2.0
"""A rank of a prefill server: one socket, on which decode servers ask for the rows of their rooms.

No thread: messages are read when the scheduler asks for the state of a request. A room is a request
that two servers share, by the number that the router gave it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from fairkv_sglang.transfer import wire
from fairkv_sglang.transfer.rows import KeptRows

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]
PING_SECONDS = 1.0
"""How often it is looked whether decode ranks are still there that a request waits for."""


@dataclass
class _Room:
    opened: bool = False  # this server has the request, too
    ranks: int = 0  # of the decode server; 0: nobody has come yet
    peers: dict[int, bytes] = field(default_factory=dict)  # decode rank -> address of its socket
    owners: dict[int, IntArray] = field(default_factory=dict)  # decode rank -> what it asked for
    served: set[int] = field(default_factory=set)
    failure: str | None = None
    since: float = field(default_factory=time.monotonic)


class PrefillEnd:
    """See the module text.

    Args:
        host: Where to listen.
        port: The port that decode servers are told; None for ranks other than 0: any.
        wait_seconds: How long a room waits for the other server's request.

    Attributes:
        about: What is told to a decode server that asks ``who``; set before the first request.
    """

    def __init__(self, host: str, port: int | None, wait_seconds: float) -> None:
        self.about: Mapping[str, Any] = {}
        self._rooms: dict[int, _Room] = {}
        self._wait = wait_seconds
        self._looked = 0.0
        self._socket = wire.make_socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to who is gone fails
        address = f"tcp://{'*' if host in ('0.0.0.0', '::') else host}"
        if port is None:
            self.port: int = self._socket.bind_to_random_port(address)
        else:
            self._socket.bind(f"{address}:{port}")
            self.port = port

    def open(self, room: int) -> None:
        """This server has the room's request."""
        self._rooms.setdefault(room, _Room()).opened = True

    def close(self, room: int) -> None:
        """The request has ended."""
        self._rooms.pop(room, None)

    def is_met(self, room: int) -> bool:
        """Whether all ranks of the decode server wait for the room."""
        here = self._rooms[room]
        return bool(here.ranks) and len(here.peers) == here.ranks

    def failure(self, room: int) -> str | None:
        """Why the room has failed; None if it has not."""
        here = self._rooms.get(room)
        if here is None:
            return None
        if not self.is_met(room) and time.monotonic() - here.since > self._wait:
            self.fail(room, f"no decode server has come for room {room} in {self._wait:g} s")
        return here.failure

    def tell_kept(self, room: int, kept: IntArray) -> None:
        """The prompt is compressed: ``kept [L, H]`` tokens."""
        header, part = wire.pack_array(kept)
        for peer in self._rooms[room].peers.values():
            self._send(room, peer, wire.pack("kept", {"room": room, **header}, [part]))

    def asked(self, room: int) -> list[tuple[int, IntArray]]:
        """Decode ranks that have asked for their rows and have not got them, with ``[L, H]`` owners
        there.
        """
        here = self._rooms[room]
        return [(rank, o) for rank, o in sorted(here.owners.items()) if rank not in here.served]

    def send_rows(self, room: int, rank: int, rows: KeptRows, extra: Sequence[bytes] = ()) -> None:
        """A decode rank's rows, and what else it is to get."""
        header, parts = wire.pack_rows(rows)
        here = self._rooms[room]
        message = wire.pack("rows", {"room": room, **header}, [*parts, *extra])
        self._send(room, here.peers[rank], message)
        here.served.add(rank)

    def is_served(self, room: int) -> bool:
        """Whether all ranks of the decode server have been sent their rows."""
        here = self._rooms[room]
        return self.is_met(room) and len(here.served) == here.ranks

    def fail(self, room: int, reason: str) -> None:
        """The room's request has failed here; the decode server is told."""
        here = self._rooms.setdefault(room, _Room())
        if here.failure is None:
            here.failure = reason
            for peer in list(here.peers.values()):
                self._send(room, peer, wire.pack("fail", {"room": room, "reason": reason}))

    def pump(self) -> None:
        """Read what has come, and now and then see who is gone."""
        while True:
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                self._take(peer, *wire.unpack(frames))
            except (wire.WireError, KeyError, TypeError, ValueError, IndexError) as error:
                logger.warning("FairKV: a message that is not understood: %s", error)
        now = time.monotonic()
        if now - self._looked > PING_SECONDS:
            self._looked = now
            self._look(now)

    def _take(self, peer: bytes, kind: str, header: dict[str, Any], parts: list[bytes]) -> None:
        if kind == "who":
            self._send(None, peer, wire.pack("about", dict(self.about)))
            return
        room, rank = int(header["room"]), int(header["rank"])
        here = self._rooms.setdefault(room, _Room())
        if kind == "hello":
            here.peers[rank], here.ranks = peer, int(header["ranks"])
            if here.failure is not None:
                reason = {"room": room, "reason": here.failure}
                self._send(room, peer, wire.pack("fail", reason))
        elif kind == "pull":
            here.owners[rank] = wire.unpack_array(header, parts[0])
        elif kind == "fail":
            here.failure = here.failure or str(header["reason"])
        else:
            raise wire.WireError(f"kind {kind!r}")

    def _look(self, now: float) -> None:
        """Rooms whose decode server is gone fail; those without a request here are forgotten."""
        for room, here in list(self._rooms.items()):
            if here.opened:
                for peer in list(here.peers.values()):
                    self._send(room, peer, wire.pack("ping", {}))
            elif now - here.since > self._wait:
                self.fail(room, f"the prefill server got no request for room {room}")
                del self._rooms[room]

    def _send(self, room: int | None, peer: bytes, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.ZMQError:  # it has no such peer any more
            here = self._rooms.get(room) if room is not None else None
            if here is not None and here.failure is None:
                here.failure = "the decode server is gone"
