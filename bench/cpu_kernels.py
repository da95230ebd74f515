# SPDX-License-Identifier: Apache-2.0
"""CPU decode kernel: ragged against uniform batches, and against what the machine can do.

    python -m fairkv_sglang.bench.cpu_kernels [--quick] [--json FILE]

One thread; times are processor time of that thread, so that other processes on the machine count
only through caches and memory. The batches of a case hold equal bytes; they and the measurements of
the machine's read bandwidth and multiply-add rate are interleaved, and medians of `--repeats`
rounds are shown with the spread of the paired ratio. `of bound` is the time that reading the K and
V bytes once or doing the multiply-adds would take at the measured rates, whichever is longer,
divided by the time taken.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import torch

from fairkv_sglang.bench.resident import KINDS, lengths, resident
from fairkv_sglang.bench.stats import ratios
from fairkv_sglang.kernels.cpu import operations

CASES = [
    ("float32", 2, 32), ("float32", 1, 128), ("float32", 4, 128), ("float32", 8, 128),
    ("bfloat16", 2, 32), ("bfloat16", 4, 128), ("bfloat16", 8, 128),
]  # fmt: skip
BATCHES = [(kind, False) for kind in KINDS] + [("lognormal", True)]
HEADS, MEAN = 8, 1024


@nb.njit(fastmath=True, nogil=True)  # type: ignore[untyped-decorator]
def _read(words):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(words.shape[0]):
        total += words[i]
    return total


def run_case(dtype_name: str, group: int, dim: int, mebibytes: int, repeats: int) -> dict[str, Any]:
    """Interleaved rounds of one (dtype, group, head dimension)."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    row_bytes = 2 * dim * dtype.itemsize
    bs = max(1, (mebibytes << 20) // (row_bytes * MEAN * HEADS))
    q = torch.randn((bs, HEADS * group, dim)).to(dtype)
    out, rows = torch.empty_like(q), torch.arange(1, bs + 1)
    words, a = np.ones((mebibytes << 20) // 4, np.float32), torch.randn(768, 768)
    work: dict[str, Callable[[], object]] = {
        "read": lambda: _read(words),
        "multiply-add": lambda: torch.mm(a, a),
    }
    for kind, scattered in BATCHES:
        lens = lengths(kind, bs * HEADS, MEAN).view(bs, HEADS)
        pages = resident(lens, dim, dtype, scattered=scattered)
        name = f"{kind}, scattered pages" if scattered else kind
        work[name] = partial(operations.decode, pages, q, rows, 0, HEADS, dim**-0.5, out)
    times: dict[str, list[float]] = {name: [] for name in work}
    for index in range(repeats + 1):  # the first one compiles
        for name, call in work.items():
            start = time.thread_time()
            call()
            times[name] += [time.thread_time() - start] if index else []
    median = {name: float(np.median(t)) for name, t in times.items()}
    read, rate = words.nbytes / median.pop("read"), 768**3 / median.pop("multiply-add")
    size, products = bs * HEADS * MEAN * row_bytes, bs * HEADS * MEAN * 2 * dim * group
    return {
        "dtype": dtype_name, "group": group, "head_dim": dim, "requests": bs, "heads": HEADS,
        "mean_tokens": MEAN, "bytes": size, "read_gb_per_s": read / 1e9,
        "gfma_per_s": rate / 1e9, "bound": "read" if size / read > products / rate else "fma",
        "batches": {
            name: {
                "ms": seconds * 1e3, "gb_per_s": size / seconds / 1e9,
                "gfma_per_s": products / seconds / 1e9,
                "of_bound": max(size / read, products / rate) / seconds,
                "over_uniform": ratios(times[name], times["uniform"]),
            }
            for name, seconds in median.items()
        },
    }  # fmt: skip


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small batches, two cases, 3 rounds")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--mebibytes", type=int, default=96, help="K and V bytes of a batch")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases, size, repeats = CASES, options.mebibytes, options.repeats
    if options.quick:
        cases, size, repeats = [CASES[0], CASES[5]], 8, 3
    results = []
    for case in cases:
        x = run_case(*case, size, repeats)
        results.append(x)
        print(
            f"{x['dtype']}, group {x['group']}, head dimension {x['head_dim']}: {x['requests']} "
            f"requests x {HEADS} heads, {x['bytes'] >> 20} MiB; machine reads "
            f"{x['read_gb_per_s']:.1f} GB/s, {x['gfma_per_s']:.0f} GFMA/s; bound: {x['bound']}"
        )
        for name, y in x["batches"].items():
            over = y["over_uniform"]
            print(
                f"  {name:27}{y['ms']:8.2f} ms {y['gb_per_s']:6.1f} GB/s {y['gfma_per_s']:6.1f} "
                f"GFMA/s  of bound {y['of_bound']:.2f}  over uniform {over['median']:.2f} "
                f"({over['quarter']:.2f}-{over['three_quarters']:.2f})",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
