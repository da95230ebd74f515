# SPDX-License-Identifier: Apache-2.0
"""The first output tokens of a request as the request says: questions after compression.

A question at the end of a prompt is seen by the scorer, and its own queries see the whole prompt.
Here the prompt is the context alone; the question's tokens are taken for the model's output, one
decode step each. They attend to the compressed context, as the answer does, and are all kept.
Needs ``--enable-custom-logit-processor``; ``fairkv eval`` uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from fairkv_sglang.patches.overrides import overrides

FORCED = "fairkv_forced_ids"
"""Key of a request's ``custom_params``: token ids of the question, sent with temperature 0."""


class ForcedTokens(CustomLogitProcessor):  # type: ignore[misc]
    """Lifts the next forced token of a request above all others.

    The place of the next token is read off the lengths that SGLang sets when it prepares a pass:
    under overlap scheduling the last output token is not known yet, and the last token of a chunk
    is followed by none.
    """

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        """``logits [rows, vocabulary]`` with those of the forced tokens raised."""
        for row, parameters in enumerate(custom_param_list or ()):
            forced = (parameters or {}).get(FORCED) or ()
            if forced:
                req = parameters["__req__"]
                place = req.kv.kv_committed_len - len(req.origin_input_ids)
                if 0 <= place < len(forced):
                    logits[row, forced[place]] = logits[row].max() + 100.0
        return logits


OVERRIDES = overrides(
    ForcedTokens,
    "sglang.srt.sampling.custom_logit_processor.CustomLogitProcessor",
    {"__call__": "fairkv eval asks questions after a prompt was compressed"},
    since="0.5.20",
    test="tests/engine/test_forced_tokens.py",
)
