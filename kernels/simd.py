# SPDX-License-Identifier: Apache-2.0
"""Vector building blocks of the CPU decode kernel, written as LLVM IR through numba intrinsics.

numba's loops leave the accumulators of a small matrix product in memory, because LLVM cannot prove
that they do not overlap the keys and values. Here each tile keeps its accumulators in registers.
Addresses are integers; `heads`, `dim` and `code` are compile-time constants. Vectors are 16 floats
wide (8 where the head dimension is not a multiple of 16); LLVM splits them where the CPU has
narrower registers.

numba's on-disk cache of `numba_decode` does not see a change of this file: touch that file too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

F32, BF16, F16 = 0, 1, 2
ITEM_BYTES = {F32: 4, BF16: 2, F16: 2}
LINE_BYTES = 64
TILE = 16
"""Key rows whose scores are made together."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_FUSED = ("contract",)


def _width(dim: int) -> int:
    return 16 if dim % 16 == 0 else 8


def _vector(kind: ir.Type, width: int) -> ir.VectorType:
    return ir.VectorType(kind, width)


def _const(kind: ir.Type, width: int, value: int) -> ir.Constant:
    return ir.Constant(_vector(kind, width), [value] * width)


def _at(b: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    where = b.add(address, _I64(offset)) if offset else address
    return b.inttoptr(where, kind.as_pointer())


def _load(b: ir.IRBuilder, address: ir.Value, offset: int, width: int, code: int) -> ir.Value:
    """`width` numbers of dtype `code` at address + offset bytes, as float32."""
    if code == F32:
        return b.load(_at(b, address, offset, _vector(_FLOAT, width)), align=4)
    if code == F16:
        half = b.load(_at(b, address, offset, _vector(_HALF, width)), align=2)
        return b.fpext(half, _vector(_FLOAT, width))
    bits = b.load(_at(b, address, offset, _vector(_I16, width)), align=2)
    wide = b.shl(b.zext(bits, _vector(_I32, width)), _const(_I32, width, 16))
    return b.bitcast(wide, _vector(_FLOAT, width))


def _store(b: ir.IRBuilder, x: ir.Value, address: ir.Value, offset: int, code: int) -> None:
    """Store float32 numbers as dtype `code`, rounded to nearest even."""
    width = x.type.count
    if code == F16:
        x = b.fptrunc(x, _vector(_HALF, width))
    elif code == BF16:
        bits = b.bitcast(x, _vector(_I32, width))
        odd = b.and_(b.lshr(bits, _const(_I32, width, 16)), _const(_I32, width, 1))
        rounded = b.add(b.add(bits, _const(_I32, width, 0x7FFF)), odd)
        rounded = b.select(b.fcmp_unordered("uno", x, x), _const(_I32, width, 0x7FC00000), rounded)
        x = b.trunc(b.lshr(rounded, _const(_I32, width, 16)), _vector(_I16, width))
    b.store(x, _at(b, address, offset, x.type), align=ITEM_BYTES[code])


def _splat(b: ir.IRBuilder, x: ir.Value, width: int) -> ir.Value:
    vector = b.insert_element(ir.Constant(_vector(_FLOAT, width), ir.Undefined), x, _I32(0))
    return b.shuffle_vector(vector, vector, _const(_I32, width, 0))


def _multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return b.fadd(b.fmul(x, y, flags=_FUSED), z, flags=_FUSED)


def _row_sums(b: ir.IRBuilder, rows: list[ir.Value]) -> ir.Value:
    """Vector of the sums of `width` vectors of that width: a transpose folded into a reduction.

    Pairs are added by shuffles that stay in 128-bit chunks (twice), then by whole chunks.
    """
    width = rows[0].type.count
    source = [c * 4 + i for c in range(width // 4) for i in range(4)]
    level = 0
    while len(rows) > 1:
        if level < 2:
            lanes = [[c + i + o for o in (0, width) for i in (0, 2)] for c in source[::4]]
            even = [i for chunk in lanes for i in chunk]
            step = 1
        else:
            even = [c + i for c in range(0, 2 * width, 8) for i in range(4)]
            step = 4
        masks = [
            ir.Constant(_vector(_I32, width), [i + shift for i in even]) for shift in (0, step)
        ]
        rows = [
            b.fadd(*(b.shuffle_vector(x, y, mask) for mask in masks))
            for x, y in zip(rows[::2], rows[1::2], strict=True)
        ]
        level += 1
    return rows[0]


def _tile_intrinsic(emit: Callable[..., None], values: tuple[Any, ...]) -> Callable[..., Any]:
    """Typing function of an intrinsic with run-time `values` and then integer literals."""

    def typing(*literals: Any) -> Any:
        if not all(isinstance(x, types.IntegerLiteral) for x in literals):
            return None
        constants = [x.literal_value for x in literals]

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(builder, *args[: len(values)], *constants)
            return context.get_dummy_value()

        return types.void(*values, *literals), codegen

    return typing


_A, _F = types.int64, types.float32


def _emit_load_row(b: Any, dst: Any, src: Any, factor: Any, dim: int, code: int) -> None:
    width = _width(dim)
    scale = _splat(b, factor, width)
    for j in range(0, dim, width):
        x = b.fmul(_load(b, src, j * ITEM_BYTES[code], width, code), scale)
        _store(b, x, dst, j * 4, F32)


def _emit_store_row(b: Any, dst: Any, src: Any, factor: Any, dim: int, code: int) -> None:
    width = _width(dim)
    scale = _splat(b, factor, width)
    for j in range(0, dim, width):
        x = b.fmul(_load(b, src, j * 4, width, F32), scale)
        _store(b, x, dst, j * ITEM_BYTES[code], code)


def _emit_scores(
    b: Any, q: Any, k: Any, s: Any, s_stride: Any, tokens: Any, heads: int, dim: int, code: int
) -> None:
    width = _width(dim)
    sums = cgutils.alloca_once(b, ir.ArrayType(_vector(_FLOAT, width), heads * TILE))
    sums_at = b.ptrtoint(sums, _I64)
    bytes_ = 4 * width
    # A loop of unknown length, so that LLVM neither unrolls it nor moves loads of different rows
    # together: keys are read strictly in memory order, as the CPU's stream prefetcher wants it.
    with cgutils.for_range(b, tokens) as loop:
        row = b.add(k, b.mul(loop.index, _I64(dim * ITEM_BYTES[code])))
        keys = [_load(b, row, j * ITEM_BYTES[code], width, code) for j in range(0, dim, width)]
        to = b.add(sums_at, b.mul(loop.index, _I64(bytes_)))
        for h in range(heads):
            # Two chains of additions hide half of their latency.
            chains: list[Any] = [None, None]
            for j, key in enumerate(keys):
                query = _load(b, q, (h * dim + j * width) * 4, width, F32)
                so_far = chains[j % 2]
                chains[j % 2] = (
                    b.fmul(query, key) if so_far is None else _multiply_add(b, query, key, so_far)
                )
            total = chains[0] if chains[1] is None else b.fadd(chains[0], chains[1])
            _store(b, total, to, h * TILE * bytes_, F32)
    for h in range(heads):
        address = b.add(s, b.mul(s_stride, _I64(4 * h)))
        for first in range(0, TILE, width):
            rows = [
                _load(b, sums_at, (h * TILE + first + t) * bytes_, width, F32) for t in range(width)
            ]
            _store(b, _row_sums(b, rows), address, first * 4, F32)


def _emit_accumulate(
    b: Any, acc: Any, p: Any, p_stride: Any, v: Any, tokens: Any, heads: int, dim: int, code: int
) -> None:
    width = _width(dim)
    columns = range(0, dim, width)
    sums = {
        (h, j): cgutils.alloca_once(b, _vector(_FLOAT, width))
        for h in range(heads)
        for j in columns
    }
    for (h, j), variable in sums.items():
        b.store(_load(b, acc, (h * dim + j) * 4, width, F32), variable)
    with cgutils.for_range(b, tokens) as loop:
        row = b.add(v, b.mul(loop.index, _I64(dim * ITEM_BYTES[code])))
        values = [_load(b, row, j * ITEM_BYTES[code], width, code) for j in columns]
        for h in range(heads):
            where = b.add(p, b.mul(b.add(b.mul(p_stride, _I64(h)), loop.index), _I64(4)))
            weight = _splat(b, b.load(_at(b, where, 0, _FLOAT)), width)
            for j, value in zip(columns, values, strict=True):
                b.store(_multiply_add(b, weight, value, b.load(sums[h, j])), sums[h, j])
    for (h, j), variable in sums.items():
        _store(b, b.load(variable), acc, (h * dim + j) * 4, F32)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load_row(typingctx: Any, dst: Any, src: Any, factor: Any, dim: Any, code: Any) -> Any:
    """float32 dst[dim] = src[dim] of dtype `code`, times `factor`."""
    return _tile_intrinsic(_emit_load_row, (_A, _A, _F))(dim, code)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store_row(typingctx: Any, dst: Any, src: Any, factor: Any, dim: Any, code: Any) -> Any:
    """dst[dim] of dtype `code` = float32 src[dim] times `factor`."""
    return _tile_intrinsic(_emit_store_row, (_A, _A, _F))(dim, code)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def scores(
    typingctx: Any, q: Any, k: Any, s: Any, s_stride: Any, tokens: Any,
    heads: Any, dim: Any, code: Any,
) -> Any:  # fmt: skip
    """s[h, t] = q[h] . k[t] for `heads` heads and up to 16 key rows; s[h, tokens:16] is garbage.

    q is float32 [heads, dim], k is [tokens, dim] of dtype `code`, both contiguous; s is float32
    with `s_stride` numbers between heads.
    """
    return _tile_intrinsic(_emit_scores, (_A, _A, _A, _A, _A))(heads, dim, code)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def accumulate(
    typingctx: Any, acc: Any, p: Any, p_stride: Any, v: Any, tokens: Any,
    heads: Any, dim: Any, code: Any,
) -> Any:  # fmt: skip
    """acc[h] += sum over `tokens` value rows of p[h, t] * v[t], for `heads` heads.

    heads * dim / 16 sums stay in registers, so up to 24 (32 registers) are fast.
    """
    return _tile_intrinsic(_emit_accumulate, (_A, _A, _A, _A, _A))(heads, dim, code)


@intrinsic  # type: ignore[untyped-decorator]
def highest_of(typingctx: Any, s: Any, count: Any, least: Any) -> Any:
    """max(least, s[0], ..., s[count - 1]) of float32; count is a multiple of TILE.

    In numba's own loop LLVM turns this into vector code only if it may assume that there is no NaN.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        s, count, least = args
        best = cgutils.alloca_once_value(b, _splat(b, least, TILE))
        with cgutils.for_range(b, b.sdiv(count, _I64(TILE))) as loop:
            x = _load(b, b.add(s, b.mul(loop.index, _I64(TILE * 4))), 0, TILE, F32)
            so_far = b.load(best)
            b.store(b.select(b.fcmp_ordered(">", x, so_far), x, so_far), best)
        lanes, width = b.load(best), TILE
        while width > 1:
            width //= 2
            halves = [
                b.shuffle_vector(
                    lanes, lanes, ir.Constant(_vector(_I32, width), [i + o for i in range(width)])
                )
                for o in (0, width)
            ]
            lanes = b.select(b.fcmp_ordered(">", *halves), *halves)
        return b.extract_element(lanes, _I32(0))

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address; any address will do."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        pointer = b.inttoptr(args[0], byte)
        b.call(function, [pointer, _I32(0), _I32(3), _I32(1)])  # read, keep, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen
