# SPDX-License-Identifier: Apache-2.0
"""KVzip (arXiv 2505.23416): attention that tokens get while the model repeats the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairkv_sglang.budgets.repeats import Attended, PassPart
from fairkv_sglang.budgets.scorers.base import SCORERS
from fairkv_sglang.budgets.scorers.beforehand import Beforehand
from fairkv_sglang.registry import option

BLOCK = 256
"""Queries whose logits are in memory at a time."""


@SCORERS.register
@dataclass(frozen=True)
class KVzip(Beforehand):
    """The most attention that a token gets in the pass that repeats its chunk.

    Behind the prompt stand an instruction to repeat it and a chunk of ``chunk`` tokens. For query
    head j of the KV head, token i behind the prompt and token t of the chunk:

        a[j, i, t] = softmax of (q[j, i] . k) * scale over the first ``sink`` tokens of the prompt
                     (those before the chunk), the chunk, and the tokens behind the prompt up to i
        score[t]   = max over j and i of a[j, i, t]      (float32)

    The first ``sink`` tokens are always kept, tokens of the chat template before the prompt's first
    chunk score 0. Asks no particular question.

    Queries are taken in by blocks that do not depend on how a pass is cut, head by head.
    """

    name: ClassVar[str] = "kvzip"
    summary: ClassVar[str] = "attention that tokens get while the model repeats the prompt"
    needs: ClassVar[str] = "passes that repeat the prompt"
    repeats: ClassVar[bool] = True

    sink: int = option(4, "First tokens of the prompt, always kept.", ge=0)
    chunk: int = option(2048, "Tokens of the prompt that are repeated in one pass.", gt=0)

    @property
    def averages_group(self) -> bool:
        """No: the score is the largest of the group."""
        return False

    def attend(self, seen: Attended | None, part: PassPart) -> Attended:
        """See the base class."""
        if seen is None:
            shape = part.k.shape[1], part.chunk
            seen = Attended(0, part.q[:0], part.q.new_zeros(shape, dtype=torch.float32))
        q, done, most = torch.cat([seen.pending, part.q]), seen.done, seen.most
        while len(q) >= BLOCK or (part.ends and len(q)):
            rows = q[:BLOCK]
            most = torch.stack(
                [
                    torch.maximum(most[i], _most(rows[:, i], part.k[:, i], part, done))
                    for i in range(len(most))
                ]
            )
            q, done = q[len(rows) :], done + len(rows)
        return Attended(done, q.clone(), most)


def _most(q: Tensor, k: Tensor, part: PassPart, done: int) -> Tensor:
    """float32 ``[chunk]`` the most attention of a block's queries ``[T, g, D]`` in one head."""
    first = part.sinks + part.chunk + done
    queries = q.transpose(0, 1).float().contiguous()  # [g, T, D]
    keys = k[: first + q.shape[0]].contiguous().float()
    logits = queries @ keys.T * part.scale
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(first + 1)
    attention = logits.masked_fill_(hidden, -torch.inf).softmax(dim=2)
    return attention[..., part.sinks : part.sinks + part.chunk].amax(dim=(0, 1))
