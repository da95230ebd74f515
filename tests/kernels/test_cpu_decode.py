# SPDX-License-Identifier: Apache-2.0
"""CPU decode attention against the torch torch_decode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fairkv_sglang.kernels import HeadPages, torch_decode
from fairkv_sglang.kernels.cpu import operations, simd

# Around page borders, around the 256-token block of the online softmax, and long.
LENS = [
    [0, 0, 0, 0, 0],
    [0, 1, 15, 16, 17],
    [255, 256, 257, 31, 700],
    [3, 0, 64, 271, 272],
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def batch(pages: HeadPages, n: int, group: int, rows: list[int]) -> tuple[torch.Tensor, ...]:
    """Queries as a slice of a fused projection, rows, and an output full of NaN."""
    make = torch.Generator().manual_seed(7)
    fused = torch.randn((len(rows), (group + 2) * n, pages.head_dim), generator=make)
    q = fused.to(pages.dtype)[:, : n * group]
    return q, torch.tensor(rows), torch.full(q.shape, torch.nan, dtype=pages.dtype)


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [
        *((g, 32, torch.float32) for g in (1, 2, 5, 8)),
        (2, 24, torch.float32),
        (2, 80, torch.float32),
        # more heads than the registers take at once, and sizes between the usual ones
        (11, 32, torch.float32),
        (12, 96, torch.bfloat16),
        (5, 192, torch.float16),
        (7, 128, torch.bfloat16),
        (1, 40, torch.bfloat16),
        (1, 256, torch.float16),
        *(  # each takes a second or two to compile
            pytest.param(*case, marks=pytest.mark.sweep)
            for case in (
                *((g, 32, torch.float32) for g in (3, 4, 7, 17)),
                *((2, d, torch.float32) for d in (16, 64)),
                (4, 128, torch.float32),
                (5, 64, torch.bfloat16),
                (6, 64, torch.float16),
            )
        ),
    ],
)
def test_equals_reference(
    filled: Callable[..., HeadPages], group: int, head_dim: int, dtype: torch.dtype
) -> None:
    pages = filled(LENS, head_dim, dtype)
    for lane_lo, n, rows in ((0, 5, [2, 1, 3]), (1, 3, [3, 0, 1]), (4, 1, [2])):
        q, of, out = batch(pages, n, group, rows)
        operations.decode(pages, q, of, lane_lo, n, head_dim**-0.5, out)
        want = torch.empty_like(out)
        torch_decode.decode(pages, q, of, lane_lo, n, head_dim**-0.5, want)
        torch.testing.assert_close(out, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("group", "dtype"), [(2, torch.float32), (5, torch.bfloat16)])
def test_attention_sinks(filled: Callable[..., HeadPages], group: int, dtype: torch.dtype) -> None:
    """Far below the logits, among them, and above all of them."""
    pages = filled(LENS, 32, dtype)
    q, rows, out = batch(pages, 5, group, [2, 0, 1, 3])
    want = torch.empty_like(out)
    without = torch.empty_like(out)
    operations.decode(pages, q, rows, 0, 5, 0.3, without)
    sinks = torch.tensor([-30.0, 0.5, 4.0, 60.0]).repeat(2 * group)[: 5 * group].to(torch.bfloat16)
    operations.decode(pages, q, rows, 0, 5, 0.3, out, sinks)
    torch_decode.decode(pages, q, rows, 0, 5, 0.3, want, sinks)
    torch.testing.assert_close(out, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not torch.allclose(out[:, 2], without[:, 2]) and not out[1].any()


def test_zero_for_what_is_not_served(filled: Callable[..., HeadPages]) -> None:
    owned = [[0] * 5, [1, 0, 1, 1, 1], [0, 1, 1, 0, 1], [1] * 5]
    lens = [[n * o for n, o in zip(*row, strict=True)] for row in zip(LENS, owned, strict=True)]
    pages = filled(lens, 32, owned=owned)
    q, rows, out = batch(pages, 5, 2, [0, 1, 2, 3])
    operations.decode(pages, q, rows, 0, 5, 1.0, out)
    empty = (torch.tensor(lens) == 0).repeat_interleave(2, dim=1)
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    assert bool((out[~empty] != 0).all())


def test_result_does_not_depend_on_the_batch_or_threads(
    filled: Callable[..., HeadPages], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = filled(LENS, 32)
    q, rows, together = batch(pages, 5, 2, [1, 2, 3])
    operations.decode(pages, q, rows, 0, 5, 0.3, together)
    alone = torch.empty_like(together)
    for i in range(3):
        for h in range(5):
            part = alone[i : i + 1, 2 * h : 2 * h + 2]
            operations.decode(
                pages, q[i : i + 1, 2 * h : 2 * h + 2], rows[i : i + 1], h, 1, 0.3, part
            )
    assert torch.equal(alone, together)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(operations, "MIN_TOKENS_PER_THREAD", 1)
    assert len(list(operations._parts(pages, rows, 0, 5))) == 3
    threaded = torch.empty_like(together)
    operations.decode(pages, q, rows, 0, 5, 0.3, threaded)
    assert torch.equal(threaded, together)


@pytest.mark.parametrize("shift", [0.0, 80.0, -3e4])
def test_large_scores_stay_finite(filled: Callable[..., HeadPages], shift: float) -> None:
    """Scores of any size, rising over the blocks, so that the running maximum moves."""
    pages = filled([[0], [700]], 16)
    k, _ = torch_decode.gather(pages, 1, 0)
    ids = pages.page(1, 0, torch.arange(44)).long()
    flat = pages.keys[ids].reshape(-1, 16)
    flat[:700, 0] = torch.linspace(0, 60, 700) + shift
    pages.keys[ids] = flat.view(-1, 16, 16, 1)
    q = torch.zeros((1, 1, 16))
    q[..., 0] = 1.0
    out, want = torch.empty((1, 1, 16)), torch.empty((1, 1, 16))
    operations.decode(pages, q, torch.tensor([1]), 0, 1, 1.0, out)
    torch_decode.decode(pages, q, torch.tensor([1]), 0, 1, 1.0, want)
    # Scores near 4e4 are themselves known to 0.004 only.
    tolerance = 4e-3 if shift < 0 else 1e-4
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)
    assert len(k) == 700


def test_one_request_with_nan_leaves_the_others_alone(filled: Callable[..., HeadPages]) -> None:
    pages = filled(LENS, 32)
    q, rows, good = batch(pages, 5, 2, [1, 2, 3])
    operations.decode(pages, q, rows, 0, 5, 0.3, good)
    q = q.clone()
    q[1] = torch.nan
    out = torch.empty_like(good)
    operations.decode(pages, q, rows, 0, 5, 0.3, out)
    assert torch.equal(out[[0, 2]], good[[0, 2]])
    held = (pages.lens[2] > 0).repeat_interleave(2)
    assert bool(out[1, held].isnan().all())


def test_bad_shapes_are_refused(filled: Callable[..., HeadPages]) -> None:
    pages = filled(LENS, 32)
    q, rows, out = batch(pages, 5, 2, [1, 2])
    cases = [
        ((pages, q.double(), rows, 0, 5, 1.0, out), "q must be torch.float32"),
        ((pages, q, rows, 1, 5, 1.0, out), "lanes 1..5 of 5"),
        ((pages, q[:, :9], rows, 0, 5, 1.0, out), "9 query heads"),
        ((pages, q, rows, 0, 5, 1.0, out[:1]), "out must be"),
        ((pages, q.transpose(1, 2).contiguous().transpose(1, 2), rows, 0, 5, 1.0, out), "contig"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            operations.decode(*arguments)
    odd = HeadPages.create(1, 2, 1, 1, 12, torch.float32)
    q = torch.zeros((1, 1, 12))
    with pytest.raises(ValueError, match="multiple of 8"):
        operations.decode(odd, q, torch.tensor([1]), 0, 1, 1.0, q.clone())


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Against torch, on halves, overflow, NaN and random numbers."""
    import numba as nb

    special = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.4e38, -3.4e38, 0.0, -0.0, 1e-40, 7.0])
    x = torch.cat([special, torch.randn(24, generator=torch.Generator().manual_seed(0))])
    got = torch.empty(32, dtype=torch.bfloat16)

    @nb.njit
    def run(to, of):  # type: ignore[no-untyped-def]
        simd.store_row(to, of, nb.float32(1), 32, 1)

    apart = torch.cat([x[0::2], x[1::2]])  # even columns, then odd ones
    run(got.data_ptr(), apart.data_ptr())
    assert torch.equal(got, x.to(torch.bfloat16))
    x.fill_(torch.nan)
    run(got.data_ptr(), x.data_ptr())
    assert bool(got.isnan().all())
