# SPDX-License-Identifier: Apache-2.0
"""Vector building blocks of the CPU decode kernel, written as LLVM IR through numba intrinsics.

numba's loops leave the accumulators of a small matrix product in memory, because LLVM cannot prove
that they do not overlap the keys and values. Here each tile keeps its accumulators in registers.

Keys and values are read as vectors of 32-bit words: one float32 or a pair of 16-bit numbers, which
become two float32 vectors with one operation each (even and odd ones). A page of keys is stored
transposed, `[words, 16 tokens]`, so that the scores of 16 tokens grow in the lanes of a vector and
nothing is summed across lanes. Sums over values are kept with even and odd columns apart until
`store_row`.

Addresses are integers; `heads`, `dim` and `code` are compile-time constants. LLVM splits vectors
where the CPU has narrower registers. numba's on-disk cache of `attention` does not see a change
of this file: touch that file too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

F32, BF16, F16 = 0, 1, 2
ITEM_BYTES = {F32: 4, BF16: 2, F16: 2}
PACK = {F32: 1, BF16: 2, F16: 2}
"""Numbers in a 32-bit word."""

LINE_BYTES = 64
TILE = 16
"""Tokens whose scores are made together: those of a page."""

CHAINS = 8 if get_host_cpu_features().get("avx512f") else 4
"""Independent sums that hide the latency of a multiply-add and fit the registers."""

UNROLL = 4
"""Words of a page of keys for each turn of the loop."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_FUSED = ("contract",)


def width(dim: int, code: int) -> int:
    """Words of a vector over `dim` numbers."""
    words = dim // PACK[code]
    return next(w for w in (16, 8, 4) if words % w == 0)


def _vector(kind: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def _const(kind: ir.Type, lanes: int, value: int) -> ir.Constant:
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def _at(b: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    where = b.add(address, _I64(offset)) if offset else address
    return b.inttoptr(where, kind.as_pointer())


def _load(b: ir.IRBuilder, address: ir.Value, offset: int, lanes: int) -> ir.Value:
    """float32 vector at address + offset bytes."""
    return b.load(_at(b, address, offset, _vector(_FLOAT, lanes)), align=4)


def _store(b: ir.IRBuilder, x: ir.Value, address: ir.Value, offset: int) -> None:
    b.store(x, _at(b, address, offset, x.type), align=4)


def _load_words(
    b: ir.IRBuilder, address: ir.Value, offset: int, lanes: int, code: int
) -> list[ir.Value]:
    """`lanes` words as float32 vectors: one, or the even and the odd numbers of pairs."""
    if code == F32:
        return [_load(b, address, offset, lanes)]
    words = b.load(_at(b, address, offset, _vector(_I32, lanes)), align=2)
    if code == F16:
        odd = b.lshr(words, _const(_I32, lanes, 16))
        return [
            b.fpext(
                b.bitcast(b.trunc(x, _vector(_I16, lanes)), _vector(_HALF, lanes)),
                _vector(_FLOAT, lanes),
            )
            for x in (words, odd)
        ]
    even = b.shl(words, _const(_I32, lanes, 16))
    odd = b.and_(words, _const(_I32, lanes, 0xFFFF0000))
    return [b.bitcast(x, _vector(_FLOAT, lanes)) for x in (even, odd)]


def _store_words(
    b: ir.IRBuilder, parts: list[ir.Value], address: ir.Value, offset: int, code: int
) -> None:
    """The reverse of `_load_words`, rounded to nearest even."""
    if code == F32:
        _store(b, parts[0], address, offset)
        return
    lanes = parts[0].type.count
    halves = []
    for x in parts:
        if code == F16:
            half = b.bitcast(b.fptrunc(x, _vector(_HALF, lanes)), _vector(_I16, lanes))
            halves.append(b.zext(half, _vector(_I32, lanes)))
            continue
        bits = b.bitcast(x, _vector(_I32, lanes))
        lowest = b.and_(b.lshr(bits, _const(_I32, lanes, 16)), _const(_I32, lanes, 1))
        rounded = b.add(b.add(bits, _const(_I32, lanes, 0x7FFF)), lowest)
        rounded = b.select(b.fcmp_unordered("uno", x, x), _const(_I32, lanes, 0x7FC00000), rounded)
        halves.append(b.lshr(rounded, _const(_I32, lanes, 16)))
    words = b.or_(halves[0], b.shl(halves[1], _const(_I32, lanes, 16)))
    b.store(words, _at(b, address, offset, words.type), align=2)


def _splat(b: ir.IRBuilder, x: ir.Value, lanes: int) -> ir.Value:
    vector = b.insert_element(ir.Constant(_vector(_FLOAT, lanes), ir.Undefined), x, _I32(0))
    return b.shuffle_vector(vector, vector, _const(_I32, lanes, 0))


def _number(b: ir.IRBuilder, address: ir.Value, offset: int, lanes: int) -> ir.Value:
    """The float32 number at address + offset bytes, in every lane."""
    return _splat(b, b.load(_at(b, address, offset, _FLOAT)), lanes)


def _multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return b.fadd(b.fmul(x, y, flags=_FUSED), z, flags=_FUSED)


def _prefetch(b: ir.IRBuilder, address: ir.Value, offset: int) -> None:
    """Ask for the cache line at address + offset bytes; any address will do.

    Into the second-level cache: requests for the first level wait for one of its few miss buffers,
    which halves the rate.
    """
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    pointer = b.inttoptr(b.add(address, _I64(offset)), byte)
    b.call(function, [pointer, _I32(0), _I32(2), _I32(1)])  # read, second level, data


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
    lanes, pack = width(dim, code), PACK[code]
    scale = _splat(b, factor, lanes)
    for j in range(0, dim // pack, lanes):
        parts = [b.fmul(x, scale) for x in _load_words(b, src, j * 4, lanes, code)]
        if pack == 1:
            _store(b, parts[0], dst, j * 4)
            continue
        both = [i + o for i in range(lanes) for o in (0, lanes)]
        mask = ir.Constant(_vector(_I32, 2 * lanes), both)
        _store(b, b.shuffle_vector(*parts, mask), dst, j * 8)


def _emit_store_row(b: Any, dst: Any, src: Any, factor: Any, dim: int, code: int) -> None:
    lanes, pack = width(dim, code), PACK[code]
    scale = _splat(b, factor, lanes)
    for j in range(0, dim // pack, lanes):
        parts = [
            b.fmul(_load(b, src, (j * pack + part * lanes) * 4, lanes), scale)
            for part in range(pack)
        ]
        _store_words(b, parts, dst, j * 4, code)


def _emit_scores(
    b: Any, q: Any, k: Any, s: Any, s_stride: Any, later: Any,
    heads: int, dim: int, code: int, fetch: int,
) -> None:  # fmt: skip
    pack = PACK[code]
    words = dim // pack
    unroll = UNROLL if words % UNROLL == 0 else 1
    chains = min(max(1, CHAINS // max(1, heads)), unroll * pack)
    zero = _const(_FLOAT, TILE, 0)
    sums = {(h, c): cgutils.alloca_once_value(b, zero) for h in range(heads) for c in range(chains)}
    with cgutils.for_range(b, _I64(words // unroll)) as loop:
        page_skip = b.mul(loop.index, _I64(unroll * LINE_BYTES))
        at, q_at = b.add(k, page_skip), b.add(q, b.mul(loop.index, _I64(unroll * pack * 4)))
        later_at = b.add(later, page_skip)
        for w in range(unroll):
            if fetch:
                _prefetch(b, later_at, w * LINE_BYTES)
            for i, keys in enumerate(_load_words(b, at, w * LINE_BYTES, TILE, code)):
                for h in range(heads):
                    x = _number(b, q_at, (h * dim + w * pack + i) * 4, TILE)
                    variable = sums[h, (w * pack + i) % chains]
                    b.store(_multiply_add(b, x, keys, b.load(variable)), variable)
    for h in range(heads):
        total = b.load(sums[h, 0])
        for c in range(1, chains):
            total = b.fadd(total, b.load(sums[h, c]))
        _store(b, total, b.add(s, b.mul(s_stride, _I64(4 * h))), 0)


def _emit_accumulate(
    b: Any, acc: Any, p: Any, p_stride: Any, v: Any, tokens: Any, later: Any,
    heads: int, dim: int, code: int, fetch: int,
) -> None:  # fmt: skip
    lanes, pack = width(dim, code), PACK[code]
    row_bytes = dim * ITEM_BYTES[code]
    columns = range(0, dim, lanes)  # in the order of `acc`: even, odd, even, odd, ...
    sums = {
        (h, j): cgutils.alloca_once(b, _vector(_FLOAT, lanes))
        for h in range(heads)
        for j in columns
    }
    for (h, j), variable in sums.items():
        b.store(_load(b, acc, (h * dim + j) * 4, lanes), variable)
    with cgutils.for_range(b, tokens) as loop:
        skip = b.mul(loop.index, _I64(row_bytes))
        row, later_row = b.add(v, skip), b.add(later, skip)
        if fetch:
            for offset in range(0, row_bytes, LINE_BYTES):
                _prefetch(b, later_row, offset)
        values = [
            part
            for j in range(0, dim // pack, lanes)
            for part in _load_words(b, row, j * 4, lanes, code)
        ]
        for h in range(heads):
            weight = _number(
                b, b.add(p, b.mul(b.add(b.mul(p_stride, _I64(h)), loop.index), _I64(4))), 0, lanes
            )
            for j, value in zip(columns, values, strict=True):
                b.store(_multiply_add(b, weight, value, b.load(sums[h, j])), sums[h, j])
    for (h, j), variable in sums.items():
        _store(b, b.load(variable), acc, (h * dim + j) * 4)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load_row(typingctx: Any, dst: Any, src: Any, factor: Any, dim: Any, code: Any) -> Any:
    """float32 dst[dim] = src[dim] of dtype `code`, times `factor`."""
    return _tile_intrinsic(_emit_load_row, (_A, _A, _F))(dim, code)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store_row(typingctx: Any, dst: Any, src: Any, factor: Any, dim: Any, code: Any) -> Any:
    """dst[dim] of dtype `code` = float32 src[dim], as `accumulate` leaves it, times `factor`."""
    return _tile_intrinsic(_emit_store_row, (_A, _A, _F))(dim, code)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def scores(
    typingctx: Any, q: Any, k: Any, s: Any, s_stride: Any, later: Any,
    heads: Any, dim: Any, code: Any, fetch: Any,
) -> Any:  # fmt: skip
    """s[h, t] = q[h] . k[t] for `heads` heads and the 16 tokens of a page.

    q is float32 [heads, dim], contiguous; k is a page of keys, 32-bit words [words, 16]; s is
    float32 with `s_stride` numbers between heads. With `fetch` the page at `later` is asked for
    meanwhile.
    """
    return _tile_intrinsic(_emit_scores, (_A, _A, _A, _A, _A))(heads, dim, code, fetch)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def accumulate(
    typingctx: Any, acc: Any, p: Any, p_stride: Any, v: Any, tokens: Any, later: Any,
    heads: Any, dim: Any, code: Any, fetch: Any,
) -> Any:  # fmt: skip
    """acc[h] += sum over `tokens` value rows of p[h, t] * v[t], for `heads` heads.

    v is [tokens, dim] of dtype `code`; acc is float32 [heads, dim], the columns of a pair of
    vectors ordered even ones first. heads * dim / 16 sums stay in registers, so up to 24 (32
    registers) are fast. With `fetch` as many rows at `later` are asked for meanwhile.
    """
    return _tile_intrinsic(_emit_accumulate, (_A, _A, _A, _A, _A, _A))(heads, dim, code, fetch)


@intrinsic  # type: ignore[untyped-decorator]
def highest_of(typingctx: Any, s: Any, count: Any, least: Any) -> Any:
    """max(least, s[0], ..., s[count - 1]) of float32; count is a multiple of TILE.

    In numba's own loop LLVM turns this into vector code only if it may assume that there is no NaN.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        s, count, least = args
        best = cgutils.alloca_once_value(b, _splat(b, least, TILE))
        with cgutils.for_range(b, b.sdiv(count, _I64(TILE))) as loop:
            x = _load(b, b.add(s, b.mul(loop.index, _I64(TILE * 4))), 0, TILE)
            so_far = b.load(best)
            b.store(b.select(b.fcmp_ordered(">", x, so_far), x, so_far), best)
        x, lanes = b.load(best), TILE
        while lanes > 1:
            lanes //= 2
            halves = [
                b.shuffle_vector(x, x, ir.Constant(_vector(_I32, lanes), [*range(o, o + lanes)]))
                for o in (0, lanes)
            ]
            x = b.select(b.fcmp_ordered(">", *halves), *halves)
        return b.extract_element(x, _I32(0))

    return types.float32(types.int64, types.int64, types.float32), codegen
