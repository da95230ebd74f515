# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's planner and FA2 paged kernel restated in plain Python: the oracle of checks.

`kernels/cuda` writes arrays that FlashInfer's kernel reads through byte offsets. Here is what that
planner (`PrefillSplitQOKVIndptr`, include/flashinfer/attention/scheduler.cuh, 0.6.18) and that
kernel do with them, one row and one tile at a time, so that the plan can be checked where there is
no GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from fairkv_sglang.kernels import PAGE_TOKENS

CHUNK = 128


def scalar_plan(lens: list[int], spare: int) -> tuple[int, list[int], list[tuple[int, int]]]:
    """Plan of one layer: chunk in tokens, o_indptr, and (row, tile) in FlashInfer's order.

    Rows without tokens get no tile; FlashInfer gives them one.
    """
    chunk = CHUNK
    while chunk * spare < sum(lens):
        chunk += CHUNK
    o_indptr, tiles = [0], []
    for row, length in enumerate(lens):
        left, tile = -(-length // PAGE_TOKENS), 0
        while left > 0:
            tiles.append((row, tile))
            left -= chunk // PAGE_TOKENS
            tile += 1
        o_indptr.append(len(tiles))
    return chunk, o_indptr, tiles


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise RuntimeError(f"FlashInfer would read a wrong {what}")


class FlashInferModel:
    """Stands in for FlashInfer's module in `FlashInferDecoder(module=...)`; any device, slow.

    Raises RuntimeError where FlashInfer would read past a buffer or get what it does not expect.
    """

    def paged_run(self, *arguments: Any) -> None:
        """Decode of one layer from the arrays that the plan points to."""
        _require(len(arguments) == 31, "number of arguments")
        (floats, ints, info, q, k, v, qo_indptr, kv_indptr, indices, last, out, *rest) = arguments
        _require(rest[:5] == [None, 0, 0, -1, False], "mask, layout, window or launch mode")
        _require(rest[5:12] == [None] * 6 + [0.0], "optional argument")
        scale, tiles, rows, group, dim = rest[12], info[0], info[1], q.shape[1], q.shape[2]
        _require(len(info) == 15, "number of plan fields")
        _require((info[3], info[10], info[13], info[14]) == (16, 0, 1, 1), "plan field")
        _require(info[11] % 16 == 0, "alignment of the log-sum-exps")
        _require(info[11] >= tiles * group * dim * q.element_size(), "place of the log-sum-exps")
        _require(floats.numel() >= info[11] + tiles * group * 4, "float workspace")
        _require(rest[-1] == floats.numel() * floats.element_size(), "float workspace size")

        def array(field: int, count: int, kind: torch.dtype = torch.int32) -> list[int]:
            part = ints[info[field] : info[field] + count * kind.itemsize]
            return part.clone().view(kind).tolist()  # type: ignore[no-any-return]

        _require(array(2, 1) == [rows] == [len(last)] == [len(kv_indptr) - 1], "number of rows")
        _require(qo_indptr.tolist() == list(range(rows + 1)), "qo_indptr")
        _require(array(5, tiles) == [0] * tiles, "query tile")
        request, tile, valid = array(4, tiles), array(6, tiles), array(12, tiles, torch.uint8)
        o_indptr, (chunk,) = array(8, rows + 1), array(9, 1)
        _require(array(7, rows + 1) == o_indptr, "merge_indptr")
        starts, last_lens = kv_indptr.tolist(), last.tolist()
        partial: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for j in range(tiles):
            if not valid[j]:
                continue
            row = request[j]
            first, end = starts[row], starts[row + 1]
            length = (end - first - 1) * PAGE_TOKENS + last_lens[row] if end > first else 0
            ids = indices[first:end].long()
            part = slice(tile[j] * chunk, min((tile[j] + 1) * chunk, length))
            keys = k[ids, :, 0].reshape(-1, dim)[part].double()
            values = v[ids, :, 0].reshape(-1, dim)[part].double()
            s = q[row].double() @ keys.T * scale
            at = o_indptr[row] + tile[j]
            _require(at not in partial, "tile: two write the same partial result")
            partial[at] = (s.logsumexp(1), s.softmax(1) @ values)
        for row in range(rows):
            mine = [partial[at] for at in range(o_indptr[row], o_indptr[row + 1])]
            out[row] = 0
            if mine:
                weights = torch.stack([lse for lse, _ in mine]).softmax(0)
                out[row] = sum(w[:, None] * o for w, (_, o) in zip(weights, mine, strict=True))
