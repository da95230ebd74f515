# SPDX-License-Identifier: Apache-2.0
"""What a scorer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fairkv_sglang.registry import Registry, option

if TYPE_CHECKING:
    from fairkv_sglang.kernels.prompts import PromptBatch


@dataclass(frozen=True)
class Scorer(ABC):
    """Importance of the tokens of a prompt, separately for each KV head.

    A scorer is a frozen dataclass; fields made by :func:`fairkv_sglang.registry.option` are its
    options. ``__post_init__`` may refuse values that do not go together with a ValueError of one
    line.

    The score of a head must not depend on which other heads are scored in the same call: under
    tensor parallelism each rank scores its own heads, and all must agree with a single rank.

    Attributes:
        name: Key in ``SCORERS`` and value of ``--fairkv-scorer``.
        summary: What a token is worth, in a few words, for ``--help``.
        needs_queries: Whether ``score`` reads ``q``: the last ``window`` query rows of the prompt.
        window: Last tokens of the prompt that every head keeps and that are not scored.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_queries: ClassVar[bool] = False

    window: int = option(
        32,
        "Last tokens of the prompt, always kept; a scorer that asks what attention they pay takes "
        "their queries.",
        gt=0,
    )

    @property
    def sink(self) -> int:
        """First tokens of the prompt that always score highest, so a budget must hold them too."""
        return 0

    @property
    def least_budget(self) -> int:
        """Fewest tokens of a budget: window and sinks, or window and one token that was chosen."""
        return self.window + max(self.sink, 1)

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

    def score_all(
        self, q: Tensor | None, k_pool: Tensor, prompts: PromptBatch, *, scale: float
    ) -> Tensor:
        """Scores of all prompts of a pass on a device; here prompt after prompt.

        Args:
            q: [P, W, n, g, D] last queries of the prompts that are scored, which come first; None
                where ``needs_queries`` is false.
            k_pool: [slots, n, D] SGLang's pool of the layer.
            prompts: The prompts.
            scale: As for :meth:`score`.

        Returns:
            float32 [n, prompts.total], prompt after prompt.
        """
        scores = k_pool.new_empty((k_pool.shape[1], prompts.total), dtype=torch.float32)
        for p, scored in enumerate(prompts.scored):
            if scored:
                slots = prompts.slots[prompts.request_rows[p], : prompts.lengths[p]]
                at = prompts.starts[p]
                scores[:, at : at + scored] = self.score(
                    None if q is None else q[p], k_pool[slots.long()], scale=scale
                )
        return scores


SCORERS: Registry[Scorer] = Registry("scorer", "fairkv_sglang.scorers")
