# SPDX-License-Identifier: Apache-2.0
"""What the heads kept of the last prompts: the profile of a server's own traffic.

Kept counts are the same numbers on every rank, and everything here is a function of the prompts in
the window alone: sums are sums of integers, and what needs floats is computed from the window in
the order of arrival. Ranks that were fed the same prompts so make the same plan from it, to the
last bit, whatever they recorded before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fairkv_sglang.profiles.head_profile import FloatArray, HeadProfile

IntArray = npt.NDArray[np.int64]

_HOTTEST = 5


class Recorder:
    """Kept tokens per (layer, KV head) of the last ``window`` prompts.

    Takes ``window * num_layers * num_heads * 8`` bytes (half a megabyte for 256 prompts of 32
    layers x 8 heads); ``add`` and ``mean`` take O(layers x heads).

    Args:
        num_layers: L, at least 1.
        num_heads: H, KV heads of the whole model, at least 1.
        window: Prompts that are remembered, at least 1.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, num_layers: int, num_heads: int, window: int) -> None:
        if min(num_layers, num_heads, window) < 1:
            raise ValueError(
                "a recorder needs layers, heads and a window of at least 1, got "
                f"{num_layers}, {num_heads}, {window}"
            )
        self.window = window
        self.count = 0  # prompts so far
        self._kept: IntArray = np.zeros((window, num_layers, num_heads), dtype=np.int64)
        self._lengths: IntArray = np.zeros(window, dtype=np.int64)
        self._sum: IntArray = np.zeros((num_layers, num_heads), dtype=np.int64)
        self._filled = 0

    @property
    def prompts(self) -> int:
        """Prompts in the window, at most ``window``."""
        return self._filled

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts in the window."""
        return int(self._lengths.sum())

    @property
    def tokens(self) -> IntArray:
        """Int64 [L, H], kept tokens of the prompts in the window; a copy."""
        return self._sum.copy()

    def add(self, kept: npt.NDArray[np.integer[Any]], prompt_len: int) -> None:
        """Record one prompt; the oldest leaves a full window.

        Args:
            kept: Integers [L, H], tokens that each head kept of it.
            prompt_len: Its length in tokens.

        Raises:
            ValueError: not whole numbers of this shape; nothing has been recorded then.
        """
        kept = np.asarray(kept)
        if kept.shape != self._sum.shape or not np.issubdtype(kept.dtype, np.integer):
            raise ValueError(
                f"kept counts must be integers {list(self._sum.shape)}, got {kept.dtype} "
                f"{list(kept.shape)}"
            )
        slot = self.count % self.window
        self._sum -= self._kept[slot]  # zeros until the window is full
        self._kept[slot] = kept
        self._sum += self._kept[slot]
        self._lengths[slot] = prompt_len
        self.count += 1
        self._filled = min(self._filled + 1, self.window)

    def clear(self) -> None:
        """Forget every prompt; ``count`` starts at 0 again."""
        self.count = self._filled = 0
        for array in (self._kept, self._lengths, self._sum):
            array.fill(0)

    def mean(self) -> FloatArray:
        """Float64 [L, H], mean kept tokens over the window; zeros without prompts."""
        return self._sum / max(self._filled, 1)

    def requests(self) -> IntArray:
        """Int64 [prompts, L, H], the window itself, oldest first; a copy."""
        if self._filled < self.window:
            return self._kept[: self._filled].copy()
        return np.roll(self._kept, -(self.count % self.window), axis=0)

    def compressed(self, layers: Sequence[int] | None = None) -> IntArray:
        """Int64 [n, L, H], prompts of the window of which not everything was kept; a copy.

        ``layers``: of which this is asked, where others keep less of any prompt; None: of all.
        """
        kept, lengths = self._kept[: self._filled], self._lengths[: self._filled]
        asked = kept if layers is None else kept[:, list(layers)]
        return kept[(asked < lengths[:, None, None]).any(axis=(1, 2))]

    def spread(self) -> float:
        """How much a head's load differs between prompts (``PlanOptions.spread``).

        The coefficient of variation of a head's share of its layer, mean over the heads weighted by
        their share. Shares, because a long prompt asks more of all heads, which no plan can even
        out. 0.0 with fewer than two prompts. O(window x layers x heads).

        The planner's REQUEST_SPREAD, 0.3, is this figure for recorded requests: 0.24 to 0.31 for
        Tangram's four scorers on Llama-3.1-8B with the floor of 0.2 (``read_requests``).
        """
        if self._filled < 2:
            return 0.0
        kept = self.requests().astype(np.float64)
        total = kept.sum(axis=2, keepdims=True)
        share = np.divide(kept, total, out=np.zeros_like(kept), where=total > 0)
        mean = share.mean(axis=0)
        if not mean.any():
            return 0.0
        return float(share.std(axis=0, ddof=1).sum() / mean.sum())

    def profile(self, model: str | None = None, **meta: Any) -> HeadProfile:
        """The window as a profile.

        Args:
            model: Name of the model, None for any.
            **meta: Plain JSON to be said in the profile's ``meta`` besides the figures of the
                window (scorer, scope, ...).

        Raises:
            ValueError: nothing has been kept yet.
        """
        if not self._sum.any():
            raise ValueError("no prompt has been recorded yet: there is nothing to make a profile")
        figures = {
            "prompts": self.prompts,
            "mean_prompt_tokens": self.prompt_tokens / self.prompts,
            "spread": self.spread(),
        }
        return HeadProfile(model, self.mean(), {"source": "traffic", **figures, **meta})

    def summary(self) -> dict[str, Any]:
        """Figures of the window in plain JSON types, small whatever the model.

        ``hottest`` has the heads that keep most, each ``[layer, head, times the mean head]``;
        ``layer_max_over_mean`` is the same for the layers' hottest heads, mean over the layers.
        """
        mean = self.mean()
        average = float(mean.mean())
        relative = mean / average if average > 0 else np.ones_like(mean)
        order = np.argsort(-relative, axis=None, kind="stable")[:_HOTTEST]
        return {
            "prompts": self.prompts,
            "window": self.window,
            "count": self.count,
            "prompt_tokens": self.prompt_tokens,
            "kept_tokens": int(self._sum.sum()),
            "spread": self.spread(),
            "hottest": [
                [int(i) // mean.shape[1], int(i) % mean.shape[1], float(relative.flat[i])]
                for i in order
            ],
            "layer_max_over_mean": _layer_skew(mean),
        }


def _layer_skew(mean: FloatArray) -> float:
    """Mean over the layers of hottest head over mean head; layers that keep nothing left out."""
    average = mean.mean(axis=1)
    some = average > 0
    return float((mean.max(axis=1)[some] / average[some]).mean()) if some.any() else 1.0
