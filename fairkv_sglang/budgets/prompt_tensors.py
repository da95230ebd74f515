# SPDX-License-Identifier: Apache-2.0
"""What a scorer gets of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairkv_sglang.budgets.rope import Rope


@dataclass(frozen=True)
class PromptTensors:
    """A prompt of N tokens in one layer, for n KV heads with g query heads each.

    Attributes:
        q: ``[W, n, g, D]`` queries of the last ``window`` tokens, or of the whole prompt if it is
            shorter, rotary embedding applied; None where the scorer does not need queries. In
            :meth:`Scorer.observe` the queries of the tokens that were computed in this pass. Query
            heads of a KV head are contiguous.
        k: ``[N, n, D]`` keys, rotary embedding applied; any float dtype.
        scale: Factor of the attention logits, normally D ** -0.5.
        v: ``[N, n, D]`` values; None where the scorer does not need them.
        layer: Layer index.
        heads: Index of each of the n heads in the layer.
        rope: The model's rotary embedding; None where the scorer does not need it.
        seen: What :meth:`Scorer.observe` made of all queries of the prompt, if it observes; the
            scores, if the scorer repeats or reads hidden states.
    """

    q: Tensor | None
    k: Tensor
    scale: float
    v: Tensor | None = None
    layer: int = 0
    heads: Sequence[int] = ()
    rope: Rope | None = None
    seen: Any = None

    def head(self, i: int) -> PromptTensors:
        """Head number i alone, in tensors of its own: what is computed from them has the same bits
        whichever other heads there are.

        Tensors have no dimension n: q ``[W, g, D]``, k and v ``[N, D]``.
        """
        return PromptTensors(
            None if self.q is None else self.q[:, i].contiguous(),
            self.k[:, i].contiguous(),
            self.scale,
            None if self.v is None else self.v[:, i].contiguous(),
            self.layer,
            (self.heads[i],) if self.heads else (i,),
            self.rope,
            None if self.seen is None else self.seen.heads[i],
        )
