# SPDX-License-Identifier: Apache-2.0
"""What a scorer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from fairkv_sglang.budgets.registry import Registry


class Scorer(ABC):
    """Importance of the tokens of a prompt, separately for each KV head.

    The score of a head must not depend on which other heads are scored in the same call: under
    tensor parallelism each rank scores its own heads, and all must agree with a single rank.

    Attributes:
        name: Key in ``SCORERS`` and value of ``--fairkv-scorer``.
        needs_queries: Whether ``score`` reads ``q``: the last ``window`` query rows of the prompt.
        window: Last tokens of the prompt that every head keeps and that are not scored.
        sink: First tokens of the prompt that always score highest, so a budget must hold them too.
    """

    name: ClassVar[str]
    needs_queries: ClassVar[bool]
    window: int
    sink: int = 0

    @abstractmethod
    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        """Scores all tokens before the window; the highest are kept.

        Args:
            q: [W, n, g, D], queries of the last ``window`` tokens, or of the whole prompt if it is
                shorter, RoPE applied. Query heads of a KV head are contiguous. None is accepted
                where ``needs_queries`` is false.
            k: [N, n, D] keys of the whole prompt, RoPE applied; any float dtype.
            scale: Factor of the attention logits, normally D ** -0.5.

        Returns:
            float32 [n, max(N - window, 0)].
        """


SCORERS: Registry[Scorer] = Registry("scorer")
