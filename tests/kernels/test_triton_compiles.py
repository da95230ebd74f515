# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles to machine code for Hopper; this needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fairkv_sglang.kernels.cuda import attention, operations, score, select, store, tiles

PAGES = "*i32 *i32 *i32 *u8 *i32 *i64 *i32"
HEAD = {"D": 80, "D_PAD": 128}
WINDOW = {"W": 20, "W_PAD": 32, **HEAD, "KEYS": 64, "PAD": 32}
BATCH = "*i32 *u8 *i64 i32 *i32 i32 i32 i32"
KERNELS = [
    (operations._count_new_pages, "*i32 *u8 *i32 *i64 i32 *i32 i32 i32 i32",
     {"PAGE": 16, "BLOCK": 1024}),
    (operations._grow, PAGES + " *i64 i32 *i64 i32 *i32 *i32 *i32 i32 i32 i32",
     {"PAGE": 16, "RUN": 16, "BLOCK": 1024, "NO_PAGE": 1, "FULL": 2}),
    (operations._pop, "*i64 *i32 i32", {"BLOCK": 1024}),
    (operations._release, "*i32 *i32 *i32 *i64 *i64 *i64 i32 i32", {"RUN": 16, "BLOCK": 128}),
    (store._take_pages,
     "*i32 *u8 *i64 *i64 *i32 *i64" + 5 * " i32" + " *i64 i32 *i64 i32 i32 *i64 *i64",
     {"PAGE": 16, "LANES": 8, "NO_PAGE": 1, "FULL": 2, "BUSY": 4, "OUTSIDE": 8}),
    (store._store_kept, "*i32 *i32 T T T T *i32 i32 *i64 i32 i32 *i64 i32 *i32 *i32 *i64 *i64 *i64"
     + 7 * " i32", {**HEAD, "PAGE": 16, "RUN": 16, "LANES": 8}),
    (operations._append, "T T *i64 i32 T T i32 i32 i32 i32 T T i32 i32 i32 i32", HEAD),
    *((attention._decode, f"T T T T *i32 *i32 *i32 *u8 *i64 {sinks} fp32" + 7 * " i32",
       {"G": 5, "G_PAD": 16, **HEAD, "PAGE": 16, "RUN": 16, "BLOCK": 64, "SINKS": sinks == "T",
        "LOG2E": 1.44}) for sinks in ("*i64", "T")),
    (score._statistics, "T T *i32 i32 *i64 i32 *fp32 *fp32 fp32" + 7 * " i32", WINDOW),
    (score._join, "*i64 i32 *fp32 *fp32 *fp32 i32 i32", {"W_PAD": 32, "STEP": 16}),
    (score._columns, "T T *i32 i32 *i64 i32 *fp32 *fp32 i32 fp32" + 7 * " i32", WINDOW),
    (score._pool, "*fp32 *i64 i32 *fp32 i32 i32",
     {"WIDTH": 7, "LARGEST": True, "KEYS": 64, "PAD": 32}),
    (select._share, "*fp32 i32 *i64 i32 *i64 i32 i32", {"HEADS": 8, "BLOCK": 2048}),
    (select._pick, "*fp32 i32 *i64 i32 *i64 i32 *i64 i32 i32 i32", {"BLOCK": 2048}),
    (tiles._lay_out, BATCH + " *i32 *i32 *i32 i32 *i32 *i32 *i32 i32 *i32 *i32",
     {"PAGE": 16, "CHUNK": 128, "BUCKETS": 64, "BLOCK": 1024}),
    (tiles._list_tiles, BATCH + " *i32 *i32 *u8 *i32 *i32 i32 *i32 i32 *i32",
     {"SORTED": True, "BUCKETS": 64, "BITS": 12, "BLOCK": 256}),
    (tiles._list_tiles, BATCH + " *i32 *i32 *u8 *i32 *i32 i32 *i32 i32 *i32",
     {"SORTED": False, "BUCKETS": 64, "BITS": 12, "BLOCK": 256}),
    (tiles._list_pages, "*i32 *i32 *i64 i32 *i32 i32 i32 i32 i32 *i32 *i32 *i32 *i32 i32",
     {"LAYERS": 128, "BLOCK": 16, "WIDE": 64, "RUN": 16}),
]
for kernel, kinds, constants in KERNELS:
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = kinds.replace("T", "*bf16").split()
    signature = dict(zip(names, kinds, strict=True)) | {name: "constexpr" for name in constants}
    source = ASTSource(
        fn=kernel, signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): x for name, x in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"], kernel
    # 227 KiB of shared memory for each block on Hopper; stay where several blocks fit.
    assert compiled.metadata.shared <= 64 << 10, (kernel, compiled.metadata.shared)
    print("compiled", kernel.__name__)
"""


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("compiled") == 19  # decode: two
