# SPDX-License-Identifier: Apache-2.0
"""KVzip keeps the sets that kvpress's press keeps: instructions, chunks, attention and cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairkv_tests.kvpress_kvzip import Letters, kept_by_scorer, scores_and_kept_by_press
from fairkv_tests.kvpress_layers import VOCABULARY, random_model

TEMPLATES = {"no template": None, "template": "(u){}(e)(a)"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("split", [(2, 3), (6, 1), (1, 6)], ids=str)
@pytest.mark.parametrize(
    ("total", "chunk"), [(240, 2048), (240, 100), (240, 60), (64, 2048), (200, 199)]
)
def test_kept_sets(
    kvpress: Any, template: str | None, split: tuple[int, int], total: int, chunk: int
) -> None:
    """One chunk and several, the last one of a token; with the template's beginning in the prompt,
    where it takes sinks and scores nothing.
    """
    model, tokenizer = random_model(split, attention="sdpa"), Letters(template)
    prompt = torch.randint(VOCABULARY, (total,), generator=torch.Generator().manual_seed(total))
    if template:
        prompt[:3] = torch.tensor(tokenizer.encode("(u)"))
    for sink in (4, 2):
        options = {"sink": sink, "chunk": chunk}
        for ratio in (0.25, 0.5, 0.75):
            _, wanted = scores_and_kept_by_press(kvpress, model, tokenizer, prompt, ratio, options)
            assert kept_by_scorer(model, tokenizer, prompt, ratio, options) == wanted
