# SPDX-License-Identifier: Apache-2.0
"""What a pass does with each prompt, read off SGLang's batch; decode implementations by name."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from fairkv_sglang.attention import decoders
from fairkv_sglang.attention.decoders import PageTableDecoder, make_decoder
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan, forward_spans
from fairkv_sglang.decode_backends import DECODE_BACKENDS, DecodeBackend
from fairkv_sglang.kernels import HeadPages, torch_decode
from fairkv_sglang.kernels.cpu import operations


def request(row: int, end: int, prompt_len: int) -> SimpleNamespace:
    return SimpleNamespace(
        kv=SimpleNamespace(req_pool_idx=row), end=end, full_untruncated_fill_ids=[0] * prompt_len
    )


def batch(extend: bool, reqs: list, lengths: list[int], running: list | None) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: extend),
        reqs=reqs,
        prefix_lens=[req.end - length for req, length in zip(reqs, lengths, strict=False)],
        extend_lens=lengths,
        decoding_reqs=running,
    )


def test_chunks_and_running_requests_are_told_apart() -> None:
    whole, chunk, last = request(3, 10, 10), request(1, 40, 90), request(5, 70, 70)
    running = [request(2, 31, 30), request(4, 12, 12)]
    spans = forward_spans(batch(True, [whole, chunk, last, *running], [4, 20, 6, 1, 1], running))
    assert spans.prompts == (
        PromptSpan(row=3, start=0, length=4, end=10, prompt_len=10),
        PromptSpan(row=1, start=4, length=20, end=40, prompt_len=90),
        PromptSpan(row=5, start=24, length=6, end=70, prompt_len=70),
    )
    assert spans.decode_rows == (2, 4) and spans.prompt_tokens == 30
    assert [span.row for span in spans.last] == [3, 5]


def test_decode_has_no_prompts() -> None:
    assert forward_spans(batch(False, [request(1, 3, 3)], [], None)) == ForwardSpans()


PAGES = HeadPages.create(1, 2, 1, 1, 8, torch.float32)
HEADS: Any = SimpleNamespace(lane_start=(0, 1))


@pytest.mark.parametrize(
    ("name", "operation"),
    [("auto", operations.decode), ("numba", operations.decode), ("torch", torch_decode.decode)],
)
def test_decoders_on_cpu(name: str, operation: object) -> None:
    decoder = make_decoder(name, PAGES, HEADS)
    assert isinstance(decoder, PageTableDecoder) and decoder.operation is operation


def test_a_decoder_of_another_package_is_made_by_its_own_factory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True)
    class Theirs(DecodeBackend):
        name: ClassVar[str] = "theirs"
        summary: ClassVar[str] = "of another package"
        devices: ClassVar[tuple[str, ...]] = ("cpu",)
        order: ClassVar[int] = 9
        factory: ClassVar[str] = "fairkv_sglang.attention.decoders:theirs"

    made = object()
    monkeypatch.setitem(DECODE_BACKENDS._classes, "theirs", Theirs)
    monkeypatch.setattr(decoders, "theirs", lambda pages, heads: made, raising=False)
    assert make_decoder("theirs", PAGES, HEADS) is made


def test_a_decoder_of_another_device_is_refused() -> None:
    with pytest.raises(
        ValueError, match="flashinfer does not run on cpu: use auto or one of numba"
    ):
        make_decoder("flashinfer", PAGES, HEADS)
