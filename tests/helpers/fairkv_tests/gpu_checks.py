# SPDX-License-Identifier: Apache-2.0
"""Correctness checks on one set of kernels and one device; each raises if something differs.

The same functions check numba on CPU, Triton in its interpreter on CPU, and Triton and FlashInfer
on CUDA. The other side is always `reference` or a scalar restatement of the rules.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from fairkv_sglang.bench import resident
from fairkv_sglang.bench.gpu.contenders import Maker
from fairkv_sglang.bench.gpu.report import need
from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages, kernels_for
from fairkv_sglang.kernels.layout import ERROR_NO_FREE_PAGE, ERROR_ROW_FULL, UNLIMITED
from fairkv_tests import reference
from fairkv_tests.flashinfer_model import scalar_plan

LANE_START = [0, 2, 5]
"""Lanes of two layers with two and three heads."""
SHORT = [[0, 1, 15, 16], [17, 127, 128, 129], [70, 0, 3, 200]]
BORDERS = [[0, 1, 15, 16], [17, 127, 128, 129], [255, 257, 0, 700], [2000, 3, 0, 31]]
"""Lengths [rows, lanes] around the borders of pages and tiles."""
KEPT = (0, 1, 15, 16, 17, 33, 50, 255, 256, 262)
"""Tokens of prompts around the borders of pages and of runs."""
GROUPS = (1, 2, 4, 5, 7, 8, 16)


def copy_to(pages: HeadPages, device: str) -> HeadPages:
    """The same state on another device, sharing nothing."""
    names = [f.name for f in fields(pages) if f.name not in ("kernels", "_host")]
    moved = {name: getattr(pages, name).to(device, copy=True) for name in names}
    return HeadPages(**moved, kernels=kernels_for(torch.device(device).type))


def same_pages(fast: HeadPages, slow: HeadPages, when: str) -> None:
    """Equal tables, contents and free stacks (up to their top)."""
    fast.check_integrity()
    for name in ("lens", "owned", "free_count", "room", "turn"):
        need(torch.equal(getattr(fast, name).cpu(), getattr(slow, name)), f"{when}: {name} differ")
    top = slow.num_free
    need(torch.equal(fast.free_pages[:top].cpu(), slow.free_pages[:top]), f"{when}: free pages")
    for row, lane in itertools.product(range(slow.rows), range(slow.lanes)):
        both = zip(
            reference.gather(fast, row, lane), reference.gather(slow, row, lane), strict=True
        )
        need(all(torch.equal(a.cpu(), b) for a, b in both), f"{when}: tokens of ({row}, {lane})")


def page_operations(
    kernels: Any, device: str, dtype: torch.dtype, by_columns: bool, rounds: int = 3
) -> None:
    """Admissions, decode steps and releases in random order, compared after every operation."""
    dim, rows = 24, range(1, 6)
    for seed in range(rounds):
        pick, make = random.Random(seed), torch.Generator().manual_seed(seed)
        lanes = LANE_START[-1]
        most = [0] * (lanes - 1) + [max(KEPT)]  # some prompts fill the last lane, then it is a ring
        fast = HeadPages.create(450, 6, lanes, 20, dim, dtype, device, by_columns, most)
        slow = copy_to(fast, "cpu")
        active: list[int] = []
        for step in range(12):
            when = f"round {seed}, step {step}"
            if len(active) < len(rows) and pick.random() < 0.6:
                row = pick.choice([r for r in rows if r not in active])
                _admit(kernels, fast, slow, row, pick, make)
                active.append(row)
                same_pages(fast, slow, f"{when}: store_kept")
            batch = [*pick.sample(active, pick.randint(1, len(active))), 0] if active else [0]
            _decode_step(kernels, fast, slow, torch.tensor(batch), make)
            same_pages(fast, slow, f"{when}: grow and append")
            if active and pick.random() < 0.3:
                gone = [active.pop(pick.randrange(len(active))), 0]
                gone.append(gone[0])  # named twice: given back once
                kernels.release(fast, torch.tensor(gone, device=device))
                reference.release(slow, torch.tensor(gone))
                same_pages(fast, slow, f"{when}: release")
        kernels.release(fast, torch.arange(6, device=device))
        fast.check_integrity()
        need(fast.num_used == 0, f"round {seed}: pages stay in use after everything was released")


def _admit(
    kernels: Any,
    fast: HeadPages,
    slow: HeadPages,
    row: int,
    pick: random.Random,
    make: torch.Generator,
) -> None:
    """A prompt with random owners and kept tokens, layer by layer, out of a pool with gaps.

    Most layers store from a pool with its own number of columns, some from one column seen as many.
    """
    owned = torch.tensor([pick.random() < 0.7 for _ in range(slow.lanes)], dtype=torch.uint8)
    room = pick.choice((UNLIMITED, UNLIMITED, 60, 20))
    for module, pages in ((kernels, fast), (reference, slow)):
        module.set_owned(pages, row, owned.to(pages.device), room)
    for first, end in itertools.pairwise(LANE_START):
        n = end - first
        m, columns = n, None
        if pick.random() < 0.8:
            m = pick.randint(1, 4)
            columns = torch.tensor([pick.randrange(-1, m) for _ in range(n)])
        expanded = pick.random() < 0.3
        pool = torch.randn((300, 2 * m + 1, slow.head_dim), generator=make).to(slow.dtype)
        slots = torch.randperm(300, generator=make)[:270]
        counts = [pick.choice(KEPT) for _ in range(m)]
        kept = torch.full((m, max(1, *counts)), 10**6)  # past a count nothing is read
        for c, count in enumerate(counts):
            kept[c, :count] = torch.randperm(270, generator=make)[:count].sort().values
            if columns is not None and c not in columns:
                counts[c] = 10**6  # nobody's column needs no pages
        for module, pages in ((kernels, fast), (reference, slow)):
            there = pool.to(pages.device)
            k, v = there[:, 1 : m + 1], there[:, m + 1 :]
            if expanded:
                k, v = (x[:, :1].expand(-1, m, -1) for x in (k, v))
            rest = [t.to(pages.device) for t in (slots, kept, torch.tensor(counts))]
            where = None if columns is None else columns.to(pages.device)
            module.store_kept(pages, row, first, k, v, *rest, where)


def _decode_step(
    kernels: Any, fast: HeadPages, slow: HeadPages, batch: torch.Tensor, make: torch.Generator
) -> None:
    """One token for each row, K and V as slices of one tensor."""
    shape = (len(batch), slow.lanes)
    fused = torch.randn((len(batch), 2 * slow.lanes + 1, slow.head_dim), generator=make)
    fused = fused.to(slow.dtype)
    results = []
    for module, pages in ((kernels, fast), (reference, slow)):
        slots = torch.full(shape, -9, device=pages.device)
        module.grow(pages, batch.to(pages.device), slots)
        there = fused.to(pages.device)
        for first, end in itertools.pairwise(LANE_START):
            k, v = there[:, first:end], there[:, slow.lanes + 1 + first : slow.lanes + 1 + end]
            module.append(pages, slots[:, first:end], k, v)
        results.append(slots.cpu())
    need(torch.equal(*results), "grow: slots differ")


def full_arena(kernels: Any, device: str, by_columns: bool) -> None:
    """What does not fit is reported and damages nothing: raised on CPU, an error bit elsewhere."""

    def reported(work: Callable[[], object], bit: int) -> None:
        try:
            work()
            need(int(pages.error) == bit, f"error bits {int(pages.error)}, expected {bit}")
        except RuntimeError as error:
            if "head pages:" not in str(error):
                raise
        pages.error.zero_()
        pages.check_integrity()

    pages = HeadPages.create(3, 3, 2, 2, 16, torch.float32, device, by_columns)
    for row in (1, 2):
        kernels.set_owned(pages, row, torch.ones(2, dtype=torch.uint8, device=device))
    rows = torch.tensor([1, 2], device=device)
    slots = torch.empty((2, 2), dtype=torch.int64, device=device)
    reported(lambda: kernels.grow(pages, rows, slots), ERROR_NO_FREE_PAGE)
    need(int(pages.lens[2, 1]) == 0, "grow: a lane without a page got a token")
    kernels.release(pages, rows)
    need(pages.num_used == 0, "release: pages stay in use")
    pool, at = torch.ones((260, 1, 16), device=device), torch.arange(260, device=device)
    for tokens, capacity, bit in ((260, 19, ERROR_ROW_FULL), (30, 1, ERROR_NO_FREE_PAGE)):
        pages = HeadPages.create(capacity, 2, 1, 2, 16, torch.float32, device, by_columns)
        kernels.set_owned(pages, 1, torch.ones(1, dtype=torch.uint8, device=device))
        counts = torch.tensor([tokens], device=device)
        kept = at[None, :tokens].contiguous()
        arguments = (pages, 1, 0, pool, pool, at, kept, counts)
        reported(lambda arguments=arguments: kernels.store_kept(*arguments), bit)  # type: ignore[misc]
        need(pages.num_used == 0 and not bool(pages.lens.any()), "store_kept: half stored")


def difference(out: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative where |want| is above 1; NaN if anything is."""
    wanted = want.float()
    return float(((out.float() - wanted).abs() / wanted.abs().clamp(min=1)).max())


def decode_equals_torch(
    decode: Callable[..., None],
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    dim: int,
    lens: Sequence[Sequence[int]] = BORDERS,
    groups: Sequence[int] = GROUPS,
    by_columns: bool | None = None,
) -> str:
    """Decode of 4 heads with padding rows and rows that are not served, for several group sizes."""
    pages = resident.resident(
        torch.tensor(lens), dim, dtype, device, scattered=True, by_columns=by_columns
    )
    pages.lens[2, 1], pages.owned[2, 1] = 0, 0
    rows = torch.tensor([*range(len(lens), 1, -1), 0, 1], device=device)
    largest = 0.0
    for group in groups:
        make = torch.Generator(device).manual_seed(group)
        q = torch.randn((len(rows), 4 * group, dim), generator=make, device=device).to(dtype)
        out, want = torch.full_like(q, torch.nan), torch.empty_like(q)
        decode(pages, q, rows, 0, 4, dim**-0.5, out)
        reference.decode(pages, q, rows, 0, 4, dim**-0.5, want)
        worst = difference(out, want)
        need(worst <= tolerance, f"group {group}: differs from torch by {worst:.3g}")
        need(bool((out[want == 0] == 0).all()), f"group {group}: an empty row is not exactly zero")
        largest = max(largest, worst)
    return f"largest difference {largest:.1e}"


def contender_equals_torch(
    maker: Maker, device: str, dtype: torch.dtype, tolerance: float, dim: int
) -> str:
    """A kernel of the comparison on two layers of uneven rows, none of them empty."""
    group, scale = 4, 0.1
    lens = torch.tensor([[1, 200], [16, 15], [17, 300], [700, 1], [129, 64]])
    pages = resident.resident(lens, dim, dtype, device, scattered=True, by_columns=False)
    rows = torch.arange(1, len(lens) + 1, device=device)
    make = torch.Generator(device).manual_seed(0)
    q = torch.randn((len(lens), group, dim), generator=make, device=device).to(dtype)
    contender, largest = maker(pages, group, scale), 0.0
    if contender.plan is not None:
        contender.plan()
    for layer in range(pages.lanes):
        out, want = torch.full_like(q, torch.nan), torch.empty_like(q)
        contender.run(layer, q, out)
        reference.decode(pages, q, rows, layer, 1, scale, want)
        worst = difference(out, want)
        need(worst <= tolerance, f"layer {layer}: differs from torch by {worst:.3g}")
        largest = max(largest, worst)
    return f"largest difference {largest:.1e}"


def snapkv_equals_torch(score: Callable[..., torch.Tensor], device: str) -> None:
    """Scores for several windows and poolings, from strided views."""
    make = torch.Generator().manual_seed(2)
    for window, total, n, group, dim in ((4, 70, 2, 3, 24), (32, 100, 1, 2, 16), (8, 8, 1, 1, 16)):
        q = torch.randn((window, n, group + 1, dim), generator=make)[:, :, 1:]
        k = 3 * torch.randn((total, n + 1, dim), generator=make)[:, 1:]
        for kernel, pooling in ((7, "max"), (5, "avg"), (1, "max")):
            got = score(q.to(device), k.to(device), 0.4, kernel, pooling).cpu()
            want = reference.snapkv_score(q, k, 0.4, kernel, pooling)
            need(got.shape == want.shape, f"shape {list(got.shape)}, not {list(want.shape)}")
            near = torch.allclose(got, want, atol=1e-5, rtol=1e-4)
            need(near, f"window {window} of {total}, {pooling} pooling: differs from torch")


def golden_plan(device: str) -> None:
    """A small plan worked out by hand."""
    pages = _pages_of(torch.tensor([[40], [129], [1000]]), device)
    made = _planned(pages, [0, 1], torch.tensor([0, 1, 2, 3], device=device), 4, True)[0]
    need(made.chunk == 384, "chunk")
    need(made.lens == [0, 40, 129, 1000], "lengths")
    need(made.o_indptr == [0, 0, 1, 2, 5], "o_indptr")
    need(made.tiles[2:] == [(3, 2), (2, 0), (1, 0)], "rests of rows")
    need(sorted(made.tiles[:2]) == [(3, 0), (3, 1)], "whole tiles")


@dataclass
class Planned:
    """Plan of one layer as FlashInfer's kernel reads it."""

    chunk: int
    o_indptr: list[int]
    tiles: list[tuple[int, int]]  # row and number of the valid ones
    lens: list[int]
    page_lists: list[list[int]]


def _pages_of(lens: torch.Tensor, device: str) -> HeadPages:
    pages = resident.resident(lens, 8, torch.bfloat16, device, scattered=True, by_columns=False)
    pages.owned[1:] = (lens > 0).to(device, torch.uint8)
    return pages


def _planned(
    pages: HeadPages, lane_start: list[int], rows: torch.Tensor, spare: int, longest_first: bool
) -> list[Planned]:
    """What the device has planned for each layer."""
    from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder
    from fairkv_sglang.kernels.cuda.workspace import read_array

    decoder = FlashInferDecoder(
        pages, lane_start, 4, spare=spare, longest_first=longest_first, module="not called"
    )
    decoder.plan(rows)
    space, made = decoder.workspace, []
    buffer, ids = space.buffer.cpu(), space.kv_indices.tolist()
    for layer, heads in enumerate(space.heads):
        n, info = len(rows) * heads, space.plan_info(layer, len(rows))
        need(info[0] == n + spare and info[1] == n, "size of the grid")
        o_indptr = read_array(buffer, info, 8, n + 1)
        valid = buffer[info[12] : info[12] + info[0]].tolist()
        count = o_indptr[-1]
        need(valid == [1] * count + [0] * (info[0] - count), "valid tiles")
        request, number = (read_array(buffer, info, field, info[0]) for field in (4, 6))
        need(not any(request[count:]) and not any(number[count:]), "invalid tiles")
        starts, last = space.kv_indptr[layer].tolist(), space.last_page_len[layer].tolist()
        lists = [ids[a:b] for a, b in itertools.pairwise(starts[: n + 1])]
        lens = [
            (len(x) - 1) * PAGE_TOKENS + m if x else 0 for x, m in zip(lists, last[:n], strict=True)
        ]
        tiles = list(zip(request, number, strict=True))[:count]
        made.append(Planned(read_array(buffer, info, 9, 1)[0], o_indptr, tiles, lens, lists))
    return made


def random_plans(device: str, rounds: int = 20) -> None:
    """Plans of 3 layers with uneven heads equal FlashInfer's rules, page lists the tables."""
    lane_start, spare = [0, 1, 4, 6], 7
    for seed in range(rounds):
        make = torch.Generator().manual_seed(seed)
        lens = torch.randint(0, 3000, (4, 6), generator=make)
        lens *= torch.rand(4, 6, generator=make) > 0.3
        pages = _pages_of(lens, device)
        rows = torch.tensor([3, 0, 4, 2, 0][: 3 + seed % 3], device=device)
        held, number = pages.lens.tolist(), torch.arange(pages.max_pages, device=device)
        for longest_first in (False, True):
            made = _planned(pages, lane_start, rows, spare, longest_first)
            for (first, end), layer in zip(itertools.pairwise(lane_start), made, strict=True):
                cells = list(itertools.product(rows.tolist(), range(first, end)))
                need(layer.lens == [held[r][lane] for r, lane in cells], "lengths")
                used = [(r, lane, number[: -(-held[r][lane] // PAGE_TOKENS)]) for r, lane in cells]
                want = [pages.page(*cell).tolist() for cell in used]
                need(layer.page_lists == want, "page lists differ from the tables")
                _follows_the_rules(layer, spare, longest_first)


def _follows_the_rules(made: Planned, spare: int, longest_first: bool) -> None:
    """One layer of a plan against the scalar restatement of FlashInfer's planner."""
    chunk, o_indptr, tiles = scalar_plan(made.lens, spare)
    need(made.chunk == chunk, f"chunk {made.chunk}, not {chunk}")
    need(made.o_indptr == o_indptr, "o_indptr differs")
    need((sorted(made.tiles) if longest_first else made.tiles) == tiles, "tiles differ")
    if longest_first:  # but for differences within a bucket
        sizes = [min(chunk, made.lens[row] - tile * chunk) for row, tile in made.tiles]
        falls = all(b <= a + chunk // 63 + 1 for a, b in itertools.pairwise(sizes))
        need(falls, "tiles are not longest first")
