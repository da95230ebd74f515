# SPDX-License-Identifier: Apache-2.0
"""CPU decode kernel: ragged against uniform batches, and against what the machine can do.

    python bench/kernels.py [--quick] [--json FILE]

One thread. Times are CPU time of that thread, so that other processes on the machine count only
through caches and memory. For every case the batches hold equal bytes; they and the measurements of
the machine's read bandwidth and multiply-add rate are interleaved, and medians of `--repeats`
rounds are shown with the spread of the paired ratio. `of bound` is the time that reading the K and
V bytes once or doing the multiply-adds would take at the measured rates, whichever is longer,
divided by the time taken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This folder holds a kernels.py, which other packages must not find as `kernels`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
os.environ["OMP_NUM_THREADS"] = "1"

import numba as nb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from fairkv_sglang.kernels import numba_cpu  # noqa: E402
from fairkv_sglang.kernels.workload import KINDS, lengths, resident  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [
    ("float32", 2, 32), ("float32", 1, 128), ("float32", 4, 128), ("float32", 8, 128),
    ("bfloat16", 2, 32), ("bfloat16", 4, 128), ("bfloat16", 8, 128),
]  # fmt: skip
BATCHES = [(kind, False) for kind in KINDS] + [("lognormal", True)]


@nb.njit(fastmath=True, nogil=True)  # type: ignore[untyped-decorator]
def _read(words):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(words.shape[0]):
        total += words[i]
    return total


def cpu_time(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def run_case(dtype_name: str, group: int, dim: int, mebibytes: int, repeats: int) -> dict[str, Any]:
    """Interleaved rounds of one (dtype, group, head dimension)."""
    dtype, heads = DTYPES[dtype_name], 8
    row_bytes = 2 * dim * dtype.itemsize
    mean = 1024
    bs = max(1, (mebibytes << 20) // (row_bytes * mean * heads))
    tokens = bs * heads * mean
    q = torch.randn((bs, heads * group, dim)).to(dtype)
    out, rows = torch.empty_like(q), torch.arange(1, bs + 1)
    words = np.ones((mebibytes << 20) // 4, np.float32)
    a = torch.randn(768, 768)
    work: dict[str, Callable[[], object]] = {
        "read": lambda: _read(words),
        "multiply-add": lambda: torch.mm(a, a),
    }
    for kind, scattered in BATCHES:
        lens = lengths(kind, bs * heads, mean).view(bs, heads)
        pages = resident(lens, dim, dtype, scattered=scattered)
        name = f"{kind}, scattered pages" if scattered else kind
        work[name] = lambda p=pages: numba_cpu.decode(p, q, rows, 0, heads, dim**-0.5, out)
    times: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(repeats):
        for name, call in work.items():
            times[name].append(cpu_time(call))
    median = {name: float(np.median(t)) for name, t in times.items()}
    read = words.nbytes / median.pop("read")
    rate = 768**3 / median.pop("multiply-add")
    size, products = tokens * row_bytes, tokens * 2 * dim * group
    bound = max(size / read, products / rate)
    batches = {}
    for name, seconds in median.items():
        ratio = np.array(times[name]) / np.array(times["uniform"])
        batches[name] = {
            "ms": seconds * 1e3,
            "gb_per_s": size / seconds / 1e9,
            "gfma_per_s": products / seconds / 1e9,
            "of_bound": bound / seconds,
            "over_uniform": float(np.median(ratio)),
            "over_uniform_quartiles": [float(x) for x in np.percentile(ratio, (25, 75))],
        }
    return {
        "dtype": dtype_name, "group": group, "head_dim": dim, "requests": bs, "heads": heads,
        "mean_tokens": mean, "bytes": size, "read_gb_per_s": read / 1e9,
        "gfma_per_s": rate / 1e9, "bound": "read" if size / read > products / rate else "fma",
        "batches": batches,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="small batches, two cases, 3 rounds")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--mebibytes", type=int, default=96, help="K and V bytes of a batch")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases, size, repeats = CASES, options.mebibytes, options.repeats
    if options.quick:
        cases, size, repeats = [("float32", 2, 32), ("bfloat16", 4, 128)], 8, 3
    results = []
    for case in cases:
        result = run_case(*case, size, repeats)
        results.append(result)
        print(
            f"{case[0]}, group {case[1]}, head dimension {case[2]}: {result['requests']} requests "
            f"x {result['heads']} heads, {result['bytes'] >> 20} MiB; machine reads "
            f"{result['read_gb_per_s']:.1f} GB/s, {result['gfma_per_s']:.0f} GFMA/s; "
            f"bound: {result['bound']}"
        )
        for name, x in result["batches"].items():
            low, high = x["over_uniform_quartiles"]
            print(
                f"  {name:27}{x['ms']:8.2f} ms {x['gb_per_s']:6.1f} GB/s {x['gfma_per_s']:6.1f} "
                f"GFMA/s  of bound {x['of_bound']:.2f}  over uniform {x['over_uniform']:.2f} "
                f"({low:.2f}-{high:.2f})",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
