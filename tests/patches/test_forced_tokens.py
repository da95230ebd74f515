# SPDX-License-Identifier: Apache-2.0
"""Which token is forced depends on the lengths of the pass alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairkv_sglang.patches.forced_tokens import FORCED, ForcedTokens


def parameters(prompt: int, computed: int, forced: list[int]) -> dict[str, Any]:
    kv = SimpleNamespace(kv_committed_len=computed)
    return {FORCED: forced, "__req__": SimpleNamespace(kv=kv, origin_input_ids=[0] * prompt)}


@pytest.mark.parametrize(
    ("computed", "expected"),
    [(4, None), (9, None), (10, 7), (11, 3), (12, 7), (13, None), (400, None)],
    ids=["chunk", "last but one", "first", "second", "third", "answer", "late"],
)
def test_forced_token_of_a_pass(computed: int, expected: int | None) -> None:
    logits = torch.randn(3, 9)
    before = logits.clone()
    some = parameters(10, computed, [7, 3, 7])
    after = ForcedTokens()(logits, [parameters(2, 2, []), some, None])  # type: ignore[list-item]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    if expected is None:
        assert torch.equal(after[1], before[1])
    else:
        assert int(after[1].argmax()) == expected and bool(after.isfinite().all())
        others = [i for i in range(9) if i != expected]
        assert torch.equal(after[1, others], before[1, others])
