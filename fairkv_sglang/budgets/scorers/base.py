# SPDX-License-Identifier: Apache-2.0
"""What a scorer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.repeats import Attended, PassPart
from fairkv_sglang.registry import Registry, option

if TYPE_CHECKING:
    import torch

    from fairkv_sglang.kernels.prompts import PromptBatch
    from fairkv_sglang.model import Model

Gate = Callable[[Tensor], Tensor]
"""From hidden states ``[T, hidden]``, the input of a layer's attention behind its norm, to scores
of n heads, float32 ``[T, n]``."""
SCORE_BYTES = 4
"""Of such a score. With the 8 bits of a bfloat16 hundreds of a prompt's tokens would tie; beside K
and V of a head with 128 numbers in 16 bits, 4 bytes are 0.8 %."""


@dataclass(frozen=True)
class Scorer(ABC):
    """Importance of the tokens of a prompt, separately for each KV head.

    A scorer is a frozen dataclass; fields made by :func:`fairkv_sglang.registry.option` are its
    options. ``__post_init__`` may refuse values that do not go together with a ValueError of one
    line.

    The score of a head must not depend on which other heads are scored in the same call: under
    tensor parallelism each rank scores its own heads, and all must agree with a single rank.
    ``fairkv_sglang.budgets.scorers.per_head`` has bases for methods in plain torch, one head at a
    time.

    Attributes:
        name: Key in ``SCORERS`` and value of ``--fairkv-scorer``.
        summary: What a token is worth, in a few words, for ``--help``.
        needs_queries: Whether it reads the last ``window`` query rows of the prompt.
        needs_values: Whether it reads the values.
        needs_rope: Whether it reads the model's rotary embedding.
        observes: Whether it has to see the queries of all tokens (``observe``). Cached prefixes
            have none, so they are computed again.
        repeats: Whether it is asked by passes that repeat the prompt (``attend``), in chunks of
            ``chunk`` tokens.
        reads_hidden: Whether tokens are scored from hidden states, when their K and V are computed,
            by weights of its own (``gates``).
        spans_heads: Whether ``combine`` makes the scores out of those of all heads of the layer.
        averages_group: Whether the score of a head is the mean of what it would be with each of its
            query heads alone. Where a KV head has several homes, each scores with the query heads
            that it has, and the mean is taken, so that others cannot be used there.
        batched: Whether ``score_all`` scores all prompts of a pass at once.
        window: Last tokens of the prompt that every head keeps and that are not scored.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_queries: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    needs_rope: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    repeats: ClassVar[bool] = False
    reads_hidden: ClassVar[bool] = False
    spans_heads: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    window: int = option(
        32,
        "Last tokens of the prompt, always kept; a scorer that asks what attention they pay takes "
        "their queries.",
        gt=0,
    )

    @property
    def averages_group(self) -> bool:
        """See the class."""
        return True

    @property
    def sink(self) -> int:
        """First tokens of the prompt that always score highest, so a budget must hold them too."""
        return 0

    @property
    def chunk(self) -> int:
        """Tokens of the prompt that are repeated in one pass, if ``repeats``."""
        raise NotImplementedError

    @property
    def least_budget(self) -> int:
        """Fewest tokens of a budget: window and sinks, or window and one token that was chosen."""
        return self.window + max(self.sink, 1)

    def check(self, model: Model) -> None:  # noqa: B027, nothing to look at
        """Looks at whatever the scorer has to read for a model, before any weight is loaded.

        Raises:
            ValueError: in one line, if the model cannot be scored.
        """

    def gates(
        self,
        model: Model,
        layers: Sequence[int],
        heads: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[int, Gate]:
        """What scores tokens in each layer, if ``reads_hidden``.

        Args:
            model: The model.
            layers: Layers with a budget.
            heads: KV heads at home on this rank.
            dtype: Of the hidden states.
            device: Where they are.

        Raises:
            ValueError: as :meth:`check`.
        """
        raise NotImplementedError

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

    def score_prompt(self, prompt: PromptTensors) -> Tensor:
        """The same from everything that a scorer can ask for; what compression calls.

        The result is read when several layers have been scored: it must not be written again.
        """
        return self.score(prompt.q, prompt.k, scale=prompt.scale)

    def score_all(
        self, q: Tensor | None, k_pool: Tensor, prompts: PromptBatch, *, scale: float
    ) -> Tensor:
        """Scores of all prompts of a pass on a device, if ``batched``.

        Args:
            q: [P, W, n, g, D] last queries of the prompts that are scored, which come first; None
                where ``needs_queries`` is false.
            k_pool: [slots, n, D] SGLang's pool of the layer.
            prompts: The prompts.
            scale: As for :meth:`score`.

        Returns:
            float32 [n, prompts.total], prompt after prompt.
        """
        raise NotImplementedError

    def observe(self, seen: Any, part: PromptTensors) -> Any:
        """Takes in the queries of the next tokens of a prompt, if ``observes``.

        Args:
            seen: What the last call gave for this prompt and layer; None at the prompt's start.
            part: ``q`` of the tokens computed in this pass, ``k`` of all tokens up to there.

        Returns:
            ``seen`` for the next call, and for :meth:`score_prompt` after the last one. It must not
            depend on how the prompt was cut.
        """
        raise NotImplementedError

    def attend(self, seen: Attended | None, part: PassPart) -> Attended:
        """Takes in the next tokens of a pass that repeats a chunk, if ``repeats``.

        Args:
            seen: What the last call for this pass and layer gave; None at its start.
            part: The tokens.

        Returns:
            For the next call; after the pass's last tokens ``most`` are the scores of the chunk,
            which are part of ``seen`` of :meth:`score_prompt`. They must not depend on how the pass
            was cut.
        """
        raise NotImplementedError

    def combine(self, scores: Tensor) -> Tensor:
        """Scores of all heads of a layer from those that each has by itself, if ``spans_heads``.

        Args:
            scores: float32 [H, M], the same on every rank.

        Returns:
            float32 [H, M].
        """
        raise NotImplementedError


SCORERS: Registry[Scorer] = Registry("scorer", "fairkv_sglang.scorers")
