# SPDX-License-Identifier: Apache-2.0
"""Start-up checks that FlashInfer still reads the plan that `tiles` writes. UNTESTED ON A GPU."""

from __future__ import annotations

import torch

from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages, torch_decode

from .flashinfer import TESTED, FlashInferDecoder, load_module
from .workspace import PLAN_FIELDS, own_plan_bytes, read_array

LENS = (700, 16, 129, 1, 2050, 300)
"""No empty row, which FlashInfer gives a tile, and rows of several tiles, without which FlashInfer
clears split_kv."""


def assert_plan_matches_flashinfer(
    dtype: torch.dtype, head_dim: int, group: int, device: torch.device | str = "cuda"
) -> None:
    """Raise RuntimeError unless FlashInfer's planner gives our arrays and our call works.

    Plans one problem with FlashInfer in CUDA-graph mode at our chunk size, reads the arrays back
    through its offsets and compares them with those of `tiles`; then compares a small decode, one
    row of it empty, with torch.
    """
    import flashinfer

    if flashinfer.__version__ not in TESTED:
        raise RuntimeError(
            f"FlashInfer {flashinfer.__version__} is not one of {', '.join(TESTED)}, whose private "
            "plan layout FairKV knows"
        )
    device = torch.device(device)
    rows = len(LENS)
    pages = HeadPages.create(1, rows + 1, 1, 200, head_dim, dtype, device, by_columns=False)
    pages.lens[1:, 0] = torch.tensor(LENS, device=device)
    pages.owned[1:] = 1
    decoder = FlashInferDecoder(
        pages, [0, 1], group, spare=8, longest_first=False, module="not called"
    )
    decoder.plan(torch.arange(1, rows + 1, device=device))
    mine, buffer = decoder.workspace.plan_info(0, rows), decoder.workspace.buffer.cpu()
    (chunk,) = read_array(buffer, mine, 9, 1)
    count = read_array(buffer, mine, 8, rows + 1)[-1]
    info, ints = _flashinfer_plan(dtype, head_dim, group, chunk, device)
    if len(info) != PLAN_FIELDS:
        raise RuntimeError(f"FlashInfer's plan has {len(info)} fields, not {PLAN_FIELDS}")
    for field in (1, 3, 13, 14):
        if info[field] != mine[field]:
            raise RuntimeError(f"FlashInfer's plan field {field}: {info[field]}, not {mine[field]}")
    for field, name, length in (
        (2, "total_num_rows", 1),
        (4, "request_indices", count),
        (5, "qo_tile_indices", count),
        (6, "kv_tile_indices", count),
        (7, "merge_indptr", rows + 1),
        (8, "o_indptr", rows + 1),
        (9, "kv_chunk_size", 1),
    ):
        got, ours = read_array(ints, info, field, length), read_array(buffer, mine, field, length)
        if got != ours:
            raise RuntimeError(f"FlashInfer's plan differs in {name}: {got}, ours {ours}")
    valid = ints[info[12] : info[12] + info[0]].tolist()
    if valid != [1] * count + [0] * (info[0] - count):
        raise RuntimeError("FlashInfer's plan differs in block_valid_mask")
    _assert_decode_matches_torch(dtype, head_dim, group, device)


def _flashinfer_plan(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    chunk: int,
    device: torch.device,
) -> tuple[list[int], torch.Tensor]:
    """FlashInfer's own plan_info and its int workspace (uint8, on the host)."""
    from flashinfer import __version__

    rows = len(LENS)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    need = own_plan_bytes(rows, group, head_dim, processors)
    floats = torch.empty(need, dtype=torch.uint8, device=device)
    ints = torch.zeros(8 << 20, dtype=torch.uint8, device=device)
    pinned = torch.zeros(8 << 20, dtype=torch.uint8, pin_memory=True)
    indptr = torch.zeros(rows + 1, dtype=torch.int32)
    indptr[1:] = (-(-torch.tensor(LENS) // PAGE_TOKENS)).cumsum(0)
    arguments = [
        floats, ints, pinned, torch.arange(rows + 1, dtype=torch.int32), indptr,
        torch.tensor(LENS, dtype=torch.int32), rows, rows, group, 1, PAGE_TOKENS,
        True,  # CUDA graph
        head_dim, head_dim,
        False,  # causal
        -1,  # window
        chunk // PAGE_TOKENS,  # fixed_split_size, in pages
        False,  # disable_split_kv
        0,  # num_colocated_ctas
    ]  # fmt: skip
    if not __version__.startswith("0.6.15"):
        arguments.append(0)  # uniform_q_len
    info = [int(x) for x in load_module(dtype, head_dim).plan(*arguments)]
    torch.cuda.synchronize(device)
    return info, ints.cpu()


def _assert_decode_matches_torch(
    dtype: torch.dtype, head_dim: int, group: int, device: torch.device
) -> None:
    pages = HeadPages.create(30, 3, 2, 20, head_dim, dtype, device, by_columns=False)
    everything = torch.ones(2, dtype=torch.uint8, device=device)
    positions = torch.arange(300, device=device)
    for row, lens in enumerate(([300, 17], [5, 0]), 1):
        pages.kernels.set_owned(pages, row, everything)
        k, v = torch.randn((2, 300, 2, head_dim), device=device).to(dtype)
        counts = torch.tensor(lens, device=device)
        pages.kernels.store_kept(pages, row, 0, k, v, positions, positions.repeat(2, 1), counts)
    rows = torch.tensor([1, 0, 2], device=device)
    q = torch.randn((3, 2 * group, head_dim), device=device).to(dtype)
    scale = head_dim**-0.5
    decoder = FlashInferDecoder(pages, [0, 2], group)
    out, want = torch.empty_like(q), torch.empty_like(q)
    decoder.plan(rows)
    decoder.decode(q, rows, 0, 2, scale, out)
    torch_decode.decode(pages, q, rows, 0, 2, scale, want)
    if bool((out[want == 0] != 0).any()):
        raise RuntimeError("FlashInfer decode: a row without pages is not exactly zero")
    worst = float((out.float() - want.float()).abs().max())
    if not worst <= 2e-2:
        raise RuntimeError(f"FlashInfer decode differs from torch by {worst:.3g}")
