# SPDX-License-Identifier: Apache-2.0
"""What ranks of two servers tell each other, over real sockets on 127.0.0.1."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
import zmq

from fairkv_sglang.transfer import prefill_end, wire
from fairkv_sglang.transfer.agreement import difference
from fairkv_sglang.transfer.decode_end import DecodeEnd
from fairkv_sglang.transfer.prefill_end import PrefillEnd
from fairkv_sglang.transfer.rows import KeptRows
from fairkv_tests.ports import free_port

ROOM = 7
KEPT = np.arange(6).reshape(2, 3) + 1
OWNERS = np.array([[0, 1, 1], [1, 0, 1]])


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Ranks:
    """The ends of all ranks of a prefill and a decode server."""

    def __init__(
        self, senders: int = 2, receivers: int = 2, wait: float = 60, port: int | None = None
    ) -> None:
        ports = [port, *[None] * (senders - 1)]
        self.senders = [PrefillEnd("127.0.0.1", port, wait) for port in ports]
        for end in self.senders:
            end.about = {"ports": [e.port for e in self.senders], "agreed": {"scorer": "snapkv"}}
        self.address = f"127.0.0.1:{self.senders[0].port}"
        self.receivers = [DecodeEnd(rank, receivers) for rank in range(receivers)]

    def pump(self) -> None:
        for end in (*self.senders, *self.receivers):
            end.pump()

    def until(self, true: Callable[[], bool]) -> None:
        def turned() -> bool:
            self.pump()
            return true()

        until(turned)

    def reach(self, receiver: DecodeEnd) -> None:
        """The prefill server has answered."""
        self.until(lambda: receiver.reach(self.address))

    def meet(self) -> None:
        """The room's request is on both servers."""
        for end in self.senders:
            end.open(ROOM)
        for receiver in self.receivers:
            receiver.open(ROOM, self.address)
            self.reach(receiver)
            receiver.hello(ROOM)
        self.until(lambda: all(end.is_met(ROOM) for end in self.senders))

    def pull(self) -> None:
        """The prompt is compressed and admitted."""
        for end in self.senders:
            end.tell_kept(ROOM, KEPT)
        self.until(lambda: all(end.kept(ROOM) is not None for end in self.receivers))
        for receiver in self.receivers:
            assert (receiver.kept(ROOM) == KEPT).all()
            receiver.pull(ROOM, OWNERS)
        self.until(lambda: all(len(e.asked(ROOM)) == len(self.receivers) for e in self.senders))

    def close(self, ends: list[PrefillEnd] | None = None) -> None:
        if ends is None:
            for receiver in self.receivers:
                receiver.shut()
        for end in self.senders if ends is None else ends:
            end._socket.close(0)


def rows_of(sender: int, receiver: int) -> KeptRows:
    k = torch.full((1, 4), 10.0 * sender + receiver)
    return KeptRows(np.array([[sender, receiver]]), np.array([1]), k, -k)


@pytest.mark.parametrize(("senders", "receivers"), [(1, 1), (2, 2), (1, 3), (3, 1)])
def test_every_receiver_gets_rows_of_every_sender(senders: int, receivers: int) -> None:
    ranks = Ranks(senders, receivers)
    ranks.meet()
    ranks.pull()
    for number, end in enumerate(ranks.senders):
        assert not end.is_served(ROOM)
        for receiver, owners in end.asked(ROOM):
            assert (owners == OWNERS).all()
            extra = [b"token"] if number == 0 else []
            end.send_rows(ROOM, receiver, rows_of(number, receiver), extra)
        assert end.is_served(ROOM) and end.asked(ROOM) == []
    ranks.until(lambda: all(end.rows(ROOM) is not None for end in ranks.receivers))
    for receiver, end in enumerate(ranks.receivers):
        parts, extra = end.rows(ROOM) or ([], [])
        assert extra == [b"token"]
        assert [p.heads.tolist() for p in parts] == [[[s, receiver]] for s in range(senders)]
        assert all(
            torch.equal(p.k, rows_of(s, receiver).k) and torch.equal(p.v, -p.k)
            for s, p in enumerate(parts)
        )
        end.close(ROOM)
    ranks.close()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_failure_reaches_the_other_server(side: str, early: bool) -> None:
    """Also where the other one's request comes later."""
    ranks = Ranks(1, 2)
    [sender], [first, second] = ranks.senders, ranks.receivers
    if early:
        for receiver in (first, second):
            receiver.open(ROOM, ranks.address)
            ranks.reach(receiver)
    else:
        ranks.meet()
        ranks.pull()
    (sender if side == "prefill" else first).fail(ROOM, "no luck")
    if early:
        sender.open(ROOM)
        second.hello(ROOM)
    told = sender if side == "decode" else second
    ranks.until(lambda: told.failure(ROOM) == "no luck")
    ranks.close()


def started_again(port: int) -> PrefillEnd:
    """As soon as ZeroMQ's thread has closed the socket that listened there."""
    for _ in range(500):
        with suppress(zmq.ZMQError):
            return PrefillEnd("127.0.0.1", port, 60)
        time.sleep(0.01)
    raise TimeoutError(f"port {port} stays in use")


def test_a_prefill_server_that_dies_fails_its_rooms_only() -> None:
    """At once; one that comes back at the same place is met anew."""
    port = free_port()
    ranks = Ranks(2, 1, port=port)
    other = Ranks(1, 1)
    ranks.meet()
    [receiver] = ranks.receivers
    receiver.open(8, other.address)
    other.until(lambda: receiver.reach(other.address))
    ranks.close(ranks.senders[1:])
    until(lambda: (receiver.pump(), receiver.failure(ROOM) is not None)[1])
    assert receiver.failure(ROOM) == f"the prefill server {ranks.address} is gone"
    assert receiver.failure(8) is None
    assert receiver.about(ranks.address) is None and receiver.about(other.address) is not None
    ranks.close(ranks.senders[:1])
    again = started_again(port)
    again.about = {"ports": [port], "agreed": {}}
    until(lambda: (again.pump(), receiver.reach(ranks.address))[1])
    again._socket.close(0)
    receiver.shut()
    other.close()


def test_rows_that_have_come_outlive_their_server() -> None:
    ranks = Ranks(1, 1)
    ranks.meet()
    ranks.pull()
    ranks.senders[0].send_rows(ROOM, 0, rows_of(0, 0))
    [receiver] = ranks.receivers
    ranks.until(lambda: receiver.rows(ROOM) is not None)
    ranks.close()
    until(lambda: (receiver.pump(), receiver.about(ranks.address) is None)[1])
    assert receiver.failure(ROOM) is None and receiver.rows(ROOM) is not None
    receiver.shut()


def test_a_decode_server_that_dies_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_end, "PING_SECONDS", 0)
    ranks = Ranks(1, 2)
    ranks.meet()
    dead = ranks.receivers.pop()
    dead._lose(ranks.address)
    ranks.until(lambda: ranks.senders[0].failure(ROOM) == "the decode server is gone")
    ranks.until(lambda: ranks.receivers[0].failure(ROOM) is None)
    ranks.close()


def test_a_request_that_only_one_server_has_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill_end, "PING_SECONDS", 0)
    ranks = Ranks(1, 1, wait=0)
    ranks.senders[0].open(ROOM)
    assert "no decode server has come for room 7" in str(ranks.senders[0].failure(ROOM))
    [receiver] = ranks.receivers
    receiver.open(8, ranks.address)
    ranks.until(lambda: receiver.reach(ranks.address))
    receiver.hello(8)
    ranks.until(lambda: receiver.failure(8) == "the prefill server got no request for room 8")
    ranks.close()


def test_strangers_are_not_understood(caplog: pytest.LogCaptureFixture) -> None:
    """And change nothing."""
    ranks = Ranks(1, 1)
    ranks.meet()
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.connect(f"tcp://{ranks.address}")
    for frames in (
        [b"GET / HTTP"],
        wire.pack("hello", {}),
        wire.pack("what", {"room": 1, "rank": 0}),
    ):
        stranger.send_multipart(frames)
    ranks.until(lambda: caplog.text.count("not understood") == 3)
    assert ranks.senders[0].is_met(ROOM)
    stranger.close(0)
    ranks.close()


def test_a_difference_is_one_line() -> None:
    prefill = {"budget": "25% of the prompt", "scorer": "snapkv", "version": "1"}
    assert difference(prefill, dict(prefill), "a:1") is None
    line = difference(prefill, {**prefill, "budget": "50% of the prompt"}, "a:1")
    assert line == (
        "FairKV was started otherwise on this decode server than on the prefill server a:1: "
        "budget '50% of the prompt' instead of '25% of the prompt'; give both the same model, "
        "budget, scorer and scope"
    )
