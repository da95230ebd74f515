# SPDX-License-Identifier: Apache-2.0
"""What a budget scope is, and the arithmetic that all share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, ParamSpec

import numpy as np
import torch
from torch import Tensor

from fairkv_sglang.budgets.waterfill import IntArray
from fairkv_sglang.model import Sliding
from fairkv_sglang.profiles import HeadProfile
from fairkv_sglang.profiles.head_profile import FloatArray
from fairkv_sglang.registry import Registry, option

P = ParamSpec("P")
CACHED_LENGTHS = 4096
"""Prompt lengths whose tables a scope remembers."""
CACHED_VARIANTS, LENGTHS_OF_VARIANT = 64, 256
"""Budgets of requests that a scope remembers, and prompt lengths of each."""
Heads = tuple[tuple[int, ...], ...]
ScopeMethod = tuple[str, tuple[tuple[str, int | float], ...]]
"""Name of a scope, and its options."""


@dataclass(frozen=True)
class BudgetSpec:
    """How much of the cache to keep.

    Attributes:
        tokens: Mean kept tokens per head, window included; or
        ratio: the same as a share of the prompt, in (0, 1]. Exactly one of the two.
        least, most: Tokens that a share is never below and above.
    """

    tokens: int | None = None
    ratio: float | None = None
    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.ratio is None):
            raise ValueError("give the budget either in tokens or as a ratio of the prompt")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"the budget must be at least 1 token, not {self.tokens}")
        if self.ratio is not None and not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"the budget ratio must be above 0 and at most 1, not {self.ratio}")
        if self.ratio is None and (self.least or self.most):
            raise ValueError("least and most are bounds of a budget that is a ratio of the prompt")
        if self.least and self.most and self.least > self.most:
            raise ValueError(f"a budget of at least {self.least} and at most {self.most} is none")

    def of(self, prompt_len: int) -> int:
        """Tokens of a prompt, before it is known what must be kept and how many there are."""
        if self.ratio is None:
            return self.tokens or 0
        # Less a hair, so that 0.07 * 100 = 7.000000000000001 does not become 8.
        tokens = max(math.ceil(self.ratio * prompt_len - 1e-9), self.least or 0)
        return tokens if self.most is None else min(tokens, self.most)

    @property
    def most_tokens(self) -> int | None:
        """The most that a prompt of any length can get, if there is such a number."""
        return self.most if self.tokens is None else self.tokens


def _read_only(function: Callable[P, IntArray]) -> Callable[P, IntArray]:
    """Results that are cached and handed to many callers must not be written to."""

    def compute(*args: P.args, **kwargs: P.kwargs) -> IntArray:
        result = function(*args, **kwargs)
        result.flags.writeable = False
        return result

    return compute


@dataclass(eq=False)
class BudgetScope:
    """Turns scores into kept tokens and says beforehand how many there can be.

    A scope is a dataclass (``eq=False, kw_only=True``); fields made by
    :func:`fairkv_sglang.registry.option` are its options, the others say what it is built for.

    A prompt of N tokens has a mean budget B(N) = ``spec.tokens`` or ceil(ratio * N) within
    ``spec.least`` and ``spec.most``, at least window + max(sink, 1) and at most N. Every head keeps
    the window, the last min(window, N) tokens; B(N) = N keeps everything. All results depend on
    their arguments alone, so every rank gets the same.

    Args:
        spec: The budget.
        num_layers, num_heads: Layers and KV heads of the whole model.
        window: Tokens that every head keeps without asking for their scores: the last ones (the
            scorer's window) and, in a variant, protected ones.
        profile: Expected shares; required by scope ``head``.
        sink: First tokens for which each budget must have room (the scorer's).
        protected: How many of the ``window`` are protected tokens; a budget need not hold those, it
            rises where they leave too little of it.
        sliding: Layers with an attention window. They have no budget and no part in those of the
            others: their heads keep what the next token attends to, of any prompt.

    Raises:
        ValueError: Budget below window + sink; profile missing or of another model.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    input_dependent: ClassVar[bool]
    """Whether kept counts depend on the scores; False: known from the prompt length alone."""
    spans_ranks: ClassVar[bool]
    """Whether ``counts`` needs the scores of all heads of the layer."""
    spans_layers: ClassVar[bool] = False
    """Whether one budget is shared by all layers: ``counts`` then needs the scores of all heads of
    the model, whose heads are numbered layer by layer."""
    needs_profile: ClassVar[bool] = False

    spec: BudgetSpec
    num_layers: int
    num_heads: int
    window: int
    profile: HeadProfile | None = None
    sink: int = 0
    protected: int = 0
    sliding: Sliding | None = None

    def __post_init__(self) -> None:
        # Neighbouring heads that are at home on one rank; all of them until a rank says otherwise.
        self.home_size = self.num_heads
        self.least = self.window + max(self.sink, 1)
        sliding = () if self.sliding is None else self.sliding.layers
        self.layers = tuple(i for i in range(self.num_layers) if i not in sliding)
        """The L' layers with budgets."""
        if self.profile is None and self.needs_profile:
            raise ValueError(profile_needed(self.name))
        if self.profile is not None:
            self.profile.require_shape(self.num_layers, self.num_heads)
        tokens, least = self.spec.most_tokens, self.least - self.protected
        if tokens is not None and tokens < least:
            raise ValueError(
                f"a budget of {tokens} tokens is below window {self.window - self.protected} + "
                f"sink {max(self.sink, 1)}: use at least {least}, or a smaller window"
            )
        self._remember(CACHED_LENGTHS)
        self._variant_cached = lru_cache(CACHED_VARIANTS)(self._variant)

    def _remember(self, lengths: int) -> None:
        # Per instance, so that a scope that is dropped takes its caches along.
        self._expected_cached = lru_cache(lengths)(_read_only(self._in_all_layers(self._expected)))
        bound = self._in_all_layers(self._per_head_bound)
        self._per_head_cached = lru_cache(lengths)(_read_only(bound))
        self._bound_cached = lru_cache(lengths)(_read_only(self._bound))

    def _in_all_layers(self, function: Callable[[int], IntArray]) -> Callable[[int], IntArray]:
        """``[L, H]`` by prompt length, from a function that gives ``[L', H]``."""
        sliding = self.sliding
        if sliding is None:
            return function

        def compute(prompt_len: int) -> IntArray:
            shape = (self.num_layers, self.num_heads)
            result = np.full(shape, sliding.kept(prompt_len), dtype=np.int64)
            result[list(self.layers)] = function(prompt_len)
            return result

        return compute

    def variant(
        self,
        spec: BudgetSpec | None = None,
        protected: int = 0,
        method: ScopeMethod | None = None,
        tokens: tuple[int, int] | None = None,
    ) -> BudgetScope:
        """The scope of a request that says for itself what is kept; cached.

        Protected tokens are kept by every head and counted inside of the budget, as the window is:
        the variant's :attr:`window` has them, and its ``counts`` takes the scores of the others
        alone. Where they leave a budget less than max(sink, 1) tokens, it is raised to that.

        Args:
            spec: The budget; None: this scope's own.
            protected: Protected tokens of the prompt before the scorer's window.
            method: Another scope; None: this one.
            tokens: Window and sink of its scorer; None: this scope's own.

        Raises:
            ValueError: Budget below window + sink; profile missing.
        """
        if spec is None and not protected and method is None and tokens is None:
            return self
        own = tokens or (self.window, self.sink)
        return self._variant_cached(self.spec if spec is None else spec, protected, method, *own)

    def _variant(
        self, spec: BudgetSpec, protected: int, method: ScopeMethod | None, window: int, sink: int
    ) -> BudgetScope:
        """See ``variant``."""
        window += protected
        if method is None:
            made = replace(self, spec=spec, window=window, sink=sink, protected=protected)
        else:
            size = self.num_layers, self.num_heads
            own = spec, *size, window, self.profile, sink, protected, self.sliding
            made = SCOPES.make(method[0], *own, **dict(method[1]))
        made.home_size = self.home_size
        made._remember(LENGTHS_OF_VARIANT)
        return made

    def budget(self, prompt_len: int) -> int:
        """B(N): mean kept tokens per head, window included."""
        return min(max(self.spec.of(prompt_len), self.least), prompt_len)

    @property
    def budgets(self) -> int:
        """Parts of a model that share a budget each: its layers, or one."""
        return 1 if self.spans_layers else self.num_layers

    def expected(self, prompt_len: int) -> IntArray:
        """[L, H] kept tokens: exact for static scopes, else what the profile lets expect.

        Read-only and cached by prompt length.
        """
        return self._expected_cached(prompt_len)

    def per_head_bound(self, prompt_len: int) -> IntArray:
        """[L, H] most tokens that each head may keep, whatever the input. Read-only, cached."""
        return self._per_head_cached(prompt_len)

    def longest(self, prompt_len: int) -> int:
        """Most tokens that a head with a budget may keep, whatever the input."""
        return int(self.per_head_bound(prompt_len)[list(self.layers)].max())

    def bound(self, prompt_len: int, heads: Sequence[Sequence[int]]) -> IntArray:
        """[L] most tokens that the given heads of each layer may keep together; [1], those of all
        layers, where one budget is shared by all.

        Args:
            prompt_len: N.
            heads: For each layer the heads, e.g. those of a prompt that a rank owns.
        """
        members = tuple(map(tuple, heads))
        if len(members) != self.num_layers:
            raise ValueError(f"heads of {len(members)} layers, expected {self.num_layers}")
        return self._bound_cached(prompt_len, members)

    def most(self, layer: int, prompt_len: int, heads: Sequence[int]) -> int:
        """Most tokens that the given heads of one layer may keep together, whatever the input."""
        return int(self.expected(prompt_len)[layer, list(heads)].sum())

    def counts(self, layer: int, heads: Sequence[int], scores: Tensor, prompt_len: int) -> Tensor:
        """int64 [n] kept tokens of the given heads of a layer, window included; see ``pick``.

        Args:
            layer: Layer index; any if ``spans_layers``.
            heads: Head index of each row; all heads of the layer if ``spans_ranks``, of the model
                if ``spans_layers``. In any order.
            scores: float32 [n, max(N - window, 0)].
            prompt_len: N.
        """
        rows = len(heads)
        shape = (rows, max(prompt_len - self.window, 0))
        if tuple(scores.shape) != shape:
            raise ValueError(f"scores have shape {list(scores.shape)}, expected {list(shape)}")
        every = self.num_heads * (len(self.layers) if self.spans_layers else 1)
        if len(set(heads)) != rows or any(not 0 <= head < every for head in heads):
            raise ValueError(f"heads {list(heads)} are not distinct heads of {every}")
        if self.spans_ranks and rows != every:
            whole = "the model" if self.spans_layers else "a layer"
            raise ValueError(f"scope {self.name!r} needs all {every} heads of {whole}, got {rows}")
        if not self.spans_layers and layer not in self.layers:
            return torch.from_numpy(self.expected(prompt_len)[layer, list(heads)]).to(scores.device)
        if self.budget(prompt_len) >= prompt_len:
            return torch.full((rows,), prompt_len, dtype=torch.int64, device=scores.device)
        return self._counts(layer, heads, scores, prompt_len)

    def _expected(self, prompt_len: int) -> IntArray:
        """``expected`` of the layers with budgets, ``[L', H]``; here the same for every head."""
        return self._alike(self.budget(prompt_len))

    def _alike(self, tokens: int) -> IntArray:
        """[L', H] of one number."""
        return np.full((len(self.layers), self.num_heads), tokens, dtype=np.int64)

    @property
    def shares(self) -> FloatArray:
        """[L', H] of the profile."""
        assert self.profile is not None
        return self.profile.shares[list(self.layers)]

    def _per_head_bound(self, prompt_len: int) -> IntArray:
        """``per_head_bound`` of the layers with budgets, ``[L', H]``."""
        return self._expected(prompt_len)

    def _bound(self, prompt_len: int, heads: Heads) -> IntArray:
        """See ``bound``."""
        sums = [self.most(layer, prompt_len, group) for layer, group in enumerate(heads)]
        return np.array(sums, dtype=np.int64)

    def _counts(self, layer: int, heads: Sequence[int], scores: Tensor, prompt_len: int) -> Tensor:
        """``counts`` where not everything is kept. Static scopes look the counts up."""
        counts = self.expected(prompt_len)[layer, list(heads)]
        return torch.from_numpy(counts).to(scores.device)


@dataclass(eq=False, kw_only=True)
class Floored(BudgetScope):
    """A scope in which every head has a part of the budget for itself."""

    floor_alpha: float = option(
        0.2, "Share of the mean budget that every head keeps in any case.", ge=0, le=1
    )

    def floor(self, prompt_len: int) -> int:
        """Tokens beyond the window that each head keeps for itself: int(B * alpha) - window."""
        return max(math.floor(self.budget(prompt_len) * self.floor_alpha + 1e-9) - self.window, 0)


SCOPES: Registry[BudgetScope] = Registry("budget scope", "fairkv_sglang.scopes")


def profile_needed(name: str) -> str:
    """Says that a scope needs a head profile, and which do not."""
    others = [other for other in SCOPES if not SCOPES[other].needs_profile]
    return (
        f"scope {name} takes the share of each head from a profile: give profile a file, or choose "
        f"scope {', '.join(others[:-1])} or {others[-1]}"
    )
