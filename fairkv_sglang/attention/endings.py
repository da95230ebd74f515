# SPDX-License-Identifier: Apache-2.0
"""Prompts that end in a pass, and what each of them keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fairkv_sglang.attention.forward_spans import PromptSpan
from fairkv_sglang.budgets import BudgetScope, Kept
from fairkv_sglang.kernels.prompts import PromptBatch

IntArray = NDArray[np.int64]


@dataclass
class Ending:
    """A prompt that ends in this pass.

    Attributes:
        span: Its tokens in the pass.
        slots: ``int64 [N]`` pool slots of the prompt.
        owners: ``[L, H]`` owner of each head.
        sources: ``[L, H]`` home from which the owner gets the head's rows.
        scope: The budget scope, with the request's own budget.
        protected: ``int64`` positions before the window that every head keeps; None if there are
            none.
        unprotected: ``int64`` the other positions before the window; None if those are all.
        counts: Per layer kept counts, ``[H]``, or of the home heads where others are not known.
        scores: ``[H, N - window]`` of each layer so far, if tokens are selected after the last one.
    """

    span: PromptSpan
    slots: Tensor
    owners: IntArray
    sources: IntArray
    scope: BudgetScope
    protected: Tensor | None = None
    unprotected: Tensor | None = None
    counts: dict[int, Tensor] = field(default_factory=dict)
    scores: list[Tensor] = field(default_factory=list)

    @property
    def compressed(self) -> bool:
        """Whether something of it is left out."""
        return self.scope.budget(self.span.prompt_len) < self.span.prompt_len

    @property
    def waits(self) -> bool:
        """Whether its tokens are selected after the last layer."""
        return self.scope.spans_layers and self.compressed


@dataclass
class Choice:
    """What a prompt keeps in one layer.

    Attributes:
        kept: Of the home heads, in pool order.
        counts: ``int64 [H]`` of all heads, on the device; None where only the homes know.
        exact: The same on the host, where it is known without waiting.
    """

    kept: Kept
    counts: Tensor | None
    exact: IntArray | None


@dataclass
class StoreBatch:
    """What the home heads of a layer keep of all prompts, on the device, in their order.

    Attributes:
        prompts: The prompts.
        indices: ``int64 [P, n, width]`` ascending positions.
        counts: ``int64 [P, n]``.
        columns: ``int64 [P, lanes of the layer]``; see :meth:`HandOver.columns`.
    """

    prompts: PromptBatch
    indices: Tensor
    counts: Tensor
    columns: Tensor


class LayerRows(NamedTuple):
    """What is handed over of a layer.

    Attributes:
        layer: Layer index.
        endings: Prompts that end in the pass.
        choices: What each of them keeps.
        k_pool: ``[slots, home heads, D]`` SGLang's pool of the layer.
        v_pool: The same for values.
        batch: What is kept, if it can be stored for all prompts at once.
    """

    layer: int
    endings: Sequence[Ending]
    choices: Sequence[Choice]
    k_pool: Tensor
    v_pool: Tensor
    batch: StoreBatch | None = None
