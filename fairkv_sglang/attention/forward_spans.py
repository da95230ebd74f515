# SPDX-License-Identifier: Apache-2.0
"""What one forward pass does with each request's prompt: known to the scheduler only.

SGLang's model code gets a ``ForwardBatch`` (and drops attributes put on it). Which prompts end in
this pass is known on the ``ScheduleBatch``, so the spans are read from that, right before the pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairkv_sglang.memory.contexts import Context, Repeat

REPEAT = "fairkv_repeat"
"""On a request of SGLang's: the pass that repeats its prompt, if its next or current pass does."""
CONTEXT = "fairkv_context"
"""The same for the context whose scores its prompt is compressed by."""


@dataclass(frozen=True)
class PromptSpan:
    """The tokens of one prompt in this pass.

    Attributes:
        row: Request-table row.
        start: Offset of the span in the pass's tokens.
        length: Tokens of the span.
        end: Prompt position after the span.
        prompt_len: Tokens of the whole prompt, with what repeats it.
        repeat: The pass that repeats the prompt, if this is part of one.
        context: Whose scores the prompt is compressed by, if the scorer repeats.
    """

    row: int
    start: int
    length: int
    end: int
    prompt_len: int
    repeat: Repeat | None = None
    context: Context | None = None

    @property
    def is_last(self) -> bool:
        """The prompt ends with this span, and is to be compressed."""
        return self.end == self.prompt_len and self.repeat is None


@dataclass(frozen=True)
class ForwardSpans:
    """Prompts of one pass, in the order of the batch; empty for decode.

    With mixed chunks (``--enable-mixed-chunk``) running requests follow the prompts in the batch,
    one token each: ``decode_rows`` are their rows.
    """

    prompts: tuple[PromptSpan, ...] = ()
    decode_rows: tuple[int, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts; tokens of running requests come after them."""
        return sum(span.length for span in self.prompts)

    @property
    def last(self) -> list[PromptSpan]:
        """Spans whose prompt ends in this pass."""
        return [span for span in self.prompts if span.is_last]


def forward_spans(batch: Any) -> ForwardSpans:
    """Read them off a ``ScheduleBatch``.

    Args:
        batch: With ``forward_mode``, ``reqs``, ``prefix_lens``, ``extend_lens``,
            ``decoding_reqs``; requests know their prompt.
    """
    if not batch.forward_mode.is_extend():
        return ForwardSpans()
    prompts, decode_rows = [], []
    running = {id(req) for req in batch.decoding_reqs or ()}
    start = 0
    lengths = zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
    for req, cached, length in lengths:
        if id(req) in running:
            decode_rows.append(req.kv.req_pool_idx)
            continue
        prompts.append(
            PromptSpan(
                row=req.kv.req_pool_idx,
                start=start,
                length=length,
                end=cached + length,
                prompt_len=len(req.full_untruncated_fill_ids),
                repeat=getattr(req, REPEAT, None),
                context=getattr(req, CONTEXT, None),
            )
        )
        start += length
    return ForwardSpans(tuple(prompts), tuple(decode_rows))
