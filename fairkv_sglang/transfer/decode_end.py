# SPDX-License-Identifier: Apache-2.0
"""A rank of a decode server: a socket for each rank of each prefill server that it gets rows from.

No thread, as on the other side. A server that dies closes its connections, which the sockets notice
(by missing heartbeats within 12 s if its machine dies), and every room with it fails.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from fairkv_sglang.transfer import wire
from fairkv_sglang.transfer.rows import KeptRows

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]
ANSWER_MILLISECONDS = 50
"""What the scheduler waits at most for a server's first answer, each time that it asks."""


class _Line:
    """A connection to a rank of a prefill server."""

    def __init__(self, address: str) -> None:
        self._socket = wire.make_socket(zmq.DEALER)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(f"tcp://{address}")

    def send(self, frames: list[bytes]) -> None:
        self._socket.send_multipart(frames)

    def wait(self, milliseconds: int) -> None:
        self._socket.poll(milliseconds)

    def receive(self) -> list[bytes] | None:
        try:
            return list(self._socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None

    @property
    def is_cut(self) -> bool:
        return bool(self._monitor.poll(0))

    def close(self) -> None:
        self._socket.disable_monitor()
        self._socket.close(0)


@dataclass
class _Server:
    lines: list[_Line]  # to each of its ranks; until it has answered to rank 0 only
    about: dict[str, Any] | None = None


@dataclass
class _Room:
    address: str
    kept: dict[int, IntArray] = field(default_factory=dict)  # prefill rank -> counts
    rows: dict[int, KeptRows] = field(default_factory=dict)  # prefill rank -> what it had
    extra: list[bytes] = field(default_factory=list)
    failure: str | None = None


class DecodeEnd:
    """See the module text.

    Args:
        rank: Tensor-parallel rank.
        ranks: Ranks of this server.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._servers: dict[str, _Server] = {}
        self._rooms: dict[int, _Room] = {}

    def about(self, address: str) -> dict[str, Any] | None:
        """What the prefill server at ``host:port`` says of itself; None until it has answered."""
        server = self._servers.get(address)
        return server.about if server is not None else None

    def reach(self, address: str) -> bool:
        """Ask who is at ``host:port``; True once it has answered."""
        if address not in self._servers:
            line = _Line(address)
            line.send(wire.pack("who", {}))
            self._servers[address] = _Server([line])
        server = self._servers[address]
        if server.about is None:
            server.lines[0].wait(ANSWER_MILLISECONDS)
            self.pump()
        return self.about(address) is not None

    def open(self, room: int, address: str) -> None:
        """This server has the room's request; its rows will come from ``address``."""
        self._rooms[room] = _Room(address)

    def hello(self, room: int) -> None:
        """Wait for the room's rows."""
        here = self._rooms[room]
        if self.about(here.address) is None:
            here.failure = here.failure or f"the prefill server {here.address} is gone"
            return
        self._tell(room, "hello", {"ranks": self.ranks})

    def kept(self, room: int) -> IntArray | None:
        """``[L, H]`` tokens that the prompt keeps, once all prefill ranks have said so."""
        here = self._rooms[room]
        server = self._servers.get(here.address)
        if server is None or len(here.kept) < len(server.lines):
            return None
        return here.kept[0]

    def pull(self, room: int, owners: NDArray[np.integer]) -> None:
        """Ask for the rows of the heads that ``owners [L, H]`` gives this rank."""
        header, part = wire.pack_array(owners)
        self._tell(room, "pull", header, [part])

    def rows(self, room: int) -> tuple[list[KeptRows], list[bytes]] | None:
        """The rows from all prefill ranks, and what else came; None until all are there."""
        here = self._rooms[room]
        if not here.kept or len(here.rows) < len(here.kept):
            return None
        return [here.rows[rank] for rank in sorted(here.rows)], here.extra

    def failure(self, room: int) -> str | None:
        """Why the room has failed; None if it has not."""
        here = self._rooms.get(room)
        return here.failure if here is not None else None

    def fail(self, room: int, reason: str) -> None:
        """The room's request has failed here; the prefill server is told."""
        here = self._rooms.get(room)
        if here is not None and here.failure is None:
            here.failure = reason
            self._tell(room, "fail", {"reason": reason})

    def close(self, room: int) -> None:
        """The room's rows are here, or nobody waits for them."""
        self._rooms.pop(room, None)

    def shut(self) -> None:
        """Close all connections. Sockets that are left to the garbage collector may go in an order
        in which their watchers block ZMQ's thread.
        """
        for address in list(self._servers):
            self._lose(address)

    def pump(self) -> None:
        """Read what has come; rooms with a server that is gone fail."""
        for address, server in list(self._servers.items()):
            cut = any(line.is_cut for line in server.lines)  # first: what had come before is read
            for rank, line in enumerate(list(server.lines)):
                while (frames := line.receive()) is not None:
                    try:
                        self._take(address, server, rank, *wire.unpack(frames))
                    except (wire.WireError, KeyError, TypeError, ValueError, IndexError) as error:
                        logger.warning("FairKV: a message that is not understood: %s", error)
            if cut:
                self._lose(address)

    def _take(
        self,
        address: str,
        server: _Server,
        rank: int,
        kind: str,
        header: dict[str, Any],
        parts: list[bytes],
    ) -> None:
        if kind == "about" and server.about is None:
            host = address.rpartition(":")[0]
            server.lines += [_Line(f"{host}:{int(port)}") for port in header["ports"][1:]]
            server.about = header
        here = self._rooms.get(int(header.get("room", -1)))
        if here is None or here.address != address:
            return  # it has ended here
        if kind == "kept":
            here.kept[rank] = wire.unpack_array(header, parts[0])
        elif kind == "rows":
            here.rows[rank] = wire.unpack_rows(header, parts[:4])
            here.extra += parts[4:]
        elif kind == "fail":
            here.failure = here.failure or str(header["reason"])

    def _tell(
        self, room: int, kind: str, header: dict[str, Any], parts: list[bytes] | None = None
    ) -> None:
        server = self._servers.get(self._rooms[room].address)
        if server is not None and server.about is not None:
            message = wire.pack(kind, {"room": room, "rank": self.rank, **header}, parts or [])
            for line in server.lines:
                line.send(message)

    def _lose(self, address: str) -> None:
        server = self._servers.pop(address)
        for line in server.lines:
            line.close()
        for number, here in self._rooms.items():
            if here.address == address and here.failure is None and self.rows(number) is None:
                here.failure = f"the prefill server {address} is gone"
