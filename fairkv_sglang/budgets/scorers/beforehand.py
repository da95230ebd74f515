# SPDX-License-Identifier: Apache-2.0
"""Bases for scorers whose scores are there before the prompt ends: made by passes of their own, or
token by token by trained weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.checkpoints import Checkpoint
from fairkv_sglang.budgets.prompt_tensors import PromptTensors
from fairkv_sglang.budgets.scorers.base import Gate, Scorer
from fairkv_sglang.budgets.scorers.per_head import ALWAYS
from fairkv_sglang.model import Model
from fairkv_sglang.registry import option

Shapes = Mapping[str, Sequence[int]]


class Beforehand(Scorer):
    """A scorer whose ``seen`` is float32 ``[n, >= N - window]``, the scores themselves."""

    needs: ClassVar[str]
    """Where they come from, for a message."""

    def score(self, q: Tensor | None, k: Tensor, *, scale: float) -> Tensor:
        """See the base class."""
        return self.score_prompt(PromptTensors(q, k, scale))

    def score_prompt(self, prompt: PromptTensors) -> Tensor:
        """See the base class."""
        total, n, _ = prompt.k.shape
        scored = max(total - self.window, 0)
        if not scored:
            return prompt.k.new_empty((n, 0), dtype=torch.float32)
        if prompt.seen is None:
            raise ValueError(f"scorer {self.name!r} needs {self.needs}")
        scores: Tensor = prompt.seen[:, :scored].clone(memory_format=torch.contiguous_format)
        scores[:, : self.sink] = ALWAYS
        return scores


@dataclass(frozen=True)
class Learned(Beforehand):
    """A scorer by weights that were trained for the model, on hidden states.

    The checkpoint's tensors are those of all layers, with the layer's number in their names.
    """

    needs: ClassVar[str] = "scores made from hidden states"
    reads_hidden: ClassVar[bool] = True
    prefix: ClassVar[str]
    """What the names of a layer's tensors begin with, ``{}`` for its number."""

    scorer_checkpoint: Path | None = option(  # noqa: RUF009
        None, "Folder with the scorer's weights for this model, as safetensors."
    )

    @abstractmethod
    def shapes(self, checkpoint: Checkpoint, model: Model) -> Shapes:
        """Tensors of a layer, by their names behind ``prefix``.

        Raises:
            ValueError: in one line, for a checkpoint of another model.
        """

    @abstractmethod
    def gate(self, weights: Mapping[str, Tensor], heads: Sequence[int], dtype: torch.dtype) -> Gate:
        """The scores of some heads of a layer.

        Args:
            weights: The layer's tensors, float32.
            heads: The heads.
            dtype: Of the model and its hidden states.
        """

    def check(self, model: Model) -> None:
        """See the base class."""
        self._open(model)

    def gates(
        self,
        model: Model,
        layers: Sequence[int],
        heads: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[int, Gate]:
        """See the base class."""
        checkpoint, names = self._open(model)
        result = {}
        for layer in layers:
            weights = {
                name: checkpoint.tensor(self.prefix.format(layer) + name).to(device, torch.float32)
                for name in names
            }
            result[layer] = self.gate(weights, heads, dtype)
        return result

    def _open(self, model: Model) -> tuple[Checkpoint, list[str]]:
        """The checkpoint, every tensor of every layer checked, and a layer's names."""
        if self.scorer_checkpoint is None:
            raise ValueError(
                f"scorer {self.name} has weights of its own for each model: give "
                "scorer_checkpoint a folder (--fairkv-scorer-checkpoint DIR)"
            )
        checkpoint = Checkpoint(self.scorer_checkpoint)
        shapes = self.shapes(checkpoint, model)
        for layer in range(model.num_layers):
            for name, shape in shapes.items():
                checkpoint.require_shape(self.prefix.format(layer) + name, shape)
        return checkpoint, list(shapes)
