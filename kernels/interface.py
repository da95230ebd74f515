# SPDX-License-Identifier: Apache-2.0
"""Operations on head pages: one interface, implemented once for each kind of device.

``cpu/`` has them in numba, ``cuda/`` in Triton. ``HeadPages`` chooses when it is made
(``pages.kernels``), so nothing looks at a device while it serves. Words: `bs` requests of a batch,
`row` a request's row in the tables, a `lane` is one (layer, head) that this rank serves, `n` heads
of one layer, `g` query heads per KV head.

On the CPU an arena or table that would overflow raises RuntimeError and nothing is changed. Device
kernels cannot raise: they leave the affected lane as it was, give slot -1 and set a bit in
`PageTensors.error`, which stops the rank when it reaches the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from .layout import UNLIMITED

if TYPE_CHECKING:
    from .layout import PageTensors
    from .prompts import PromptBatch


class PromptKernels(Protocol):
    """Operations on all prompts that end in a pass, where launches cost more than the work."""

    def snapkv_scores(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        prompts: PromptBatch,
        scale: float,
        kernel: int,
        pooling: str,
    ) -> torch.Tensor:
        """Scores of the tokens before the window of all prompts, one after the other.

        Args:
            q: [P, W, n, g, D] queries of the last W tokens of each prompt that is scored; these
                come first in the batch.
            k_pool: [slots, n, D] keys; any strides but the last, which is 1.
            prompts: What is scored.
            scale, kernel, pooling: see :meth:`Kernels.snapkv_score`.

        Returns:
            float32 [n, prompts.total]
        """

    def shared_counts(self, scores: torch.Tensor, prompts: PromptBatch, group: int) -> torch.Tensor:
        """Ada-KV's kept tokens, int64 [P, rows]: each `group` neighbouring heads compete.

        scores: float32 [rows, prompts.total]. See ``budgets/scopes/pooled.py`` for the arithmetic.
        """

    def pick(
        self, scores: torch.Tensor, counts: torch.Tensor, prompts: PromptBatch, width: int
    ) -> torch.Tensor:
        """Ascending kept positions, int64 [P, n, width]; -1 behind counts[p, h].

        scores: float32 [n, prompts.total]. counts: int64 [P, n], window included, at most `width`.
        The tokens of ``budgets.pick``.
        """

    def store_all_kept(
        self,
        pages: PageTensors,
        rows: torch.Tensor,
        lane_lo: int,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        slots: torch.Tensor,
        kept_idx: torch.Tensor,
        counts: torch.Tensor,
        columns: torch.Tensor,
    ) -> None:
        """:meth:`Kernels.store_kept` for several prompts.

        Args:
            rows: int64 [P] of the prompts, all different.
            slots: int [rows, context] SGLang's request table: pool slot of each (row, position).
            kept_idx: int64 [P, m, most].
            counts: int64 [P, m].
            columns: int64 [P, n].
        """


class Kernels(Protocol):
    """Operations of one kind of device; a module or an object."""

    prompts: PromptKernels | None
    """Operations on all prompts of a pass, if compression is to use them."""

    def set_owned(
        self, pages: PageTensors, row: int, owned: torch.Tensor, room: int = UNLIMITED
    ) -> None:
        """At admission: which lanes this rank serves for the request in `row`.

        owned: uint8 or bool [lanes]. room: pages that its prompt may take, see `store_kept`. The
        row must hold no pages and must not be the padding row 0.
        """

    def grow(self, pages: PageTensors, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Make room for one token in every owned lane of every row; all layers at once.

        rows: int64 [bs], no row twice but the padding row. slots: int64 [bs, lanes], overwritten
        with the arena slot (page * 16 + offset) of the new token, -1 where the lane is not owned.
        Lengths are advanced here, except in lanes that hold all that they ever do (`pages.most`):
        there the new token takes the slot of the oldest.
        """

    def release(self, pages: PageTensors, rows: torch.Tensor) -> None:
        """Give back all pages of the rows, int64 [m]; length and ownership become 0. Idempotent."""

    def store_kept(
        self,
        pages: PageTensors,
        row: int,
        lane_lo: int,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        token_slots: torch.Tensor,
        kept_idx: torch.Tensor,
        counts: torch.Tensor,
        columns: torch.Tensor | None = None,
    ) -> None:
        """After the last chunk of a prompt, for one layer: copy the kept rows into new pages.

        The pool has m columns, the layer n lanes on this rank.

        Args:
            k_pool, v_pool: [slots, m, D] the layer's prefill pool; any strides but the last, which
                is 1. All columns may be one (a stride of 0).
            token_slots: int64 [N], pool slot of each prompt position.
            kept_idx: int64 [m, most], ascending positions; what follows the first counts[c] of row
                c is not read.
            counts: int64 [m], kept tokens of each column.
            columns: int64 [n], lane lane_lo + j takes column columns[j] < m of the pools, of
                kept_idx and of counts. Several lanes may take a column, or none. None: n is m and
                every lane takes the column of its own number.

        Nothing happens for a lane that `row` does not own or whose columns[j] is negative. A column
        that no other lane takes needs no pages, and its row of kept_idx and of counts is not read.

        If the lanes together need more pages than `room[row]`, nothing is stored, and nothing of
        the prompt from then on: who gave it that room knows by the counts. That is no error.
        """

    def append(
        self, pages: PageTensors, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write the new token's K and V, [bs, n, D] each, to `slots` int64 [bs, n]; -1: skipped."""

    def decode(
        self,
        pages: PageTensors,
        q: torch.Tensor,
        rows: torch.Tensor,
        lane_lo: int,
        n: int,
        scale: float,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attention of one layer's new tokens over lens[row, lane] tokens, the new one included.

        q, out: [bs, n * g, D], query heads g*h .. g*h + g - 1 belong to head h. sinks: [n * g], a
        logit of each query head that takes part in the softmax and has no value. Accumulates in
        float32. Exact zeros where the lane is not owned or empty. A (row, head) result does not
        depend on the rest of the batch on CPU.
        """

    def snapkv_score(
        self, q: torch.Tensor, k: torch.Tensor, scale: float, kernel: int, pooling: str
    ) -> torch.Tensor:
        """SnapKV's importance of each prompt token before the window (arXiv 2404.14469, section 4).

        Args:
            q: [W, n, g, D] queries of the last W tokens, with RoPE.
            k: [N, n, D] keys of the prompt.
            kernel: odd width of the pooling over neighbouring tokens; 1 = none.
            pooling: "max" or "avg".

        Returns:
            float32 [n, N - W]; higher = keep. The attention of the W rows is averaged, pooled, then
            averaged over the group.
        """
