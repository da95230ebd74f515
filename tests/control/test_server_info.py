# SPDX-License-Identifier: Apache-2.0
"""A question about a server is answered, whatever is wrong with the answer."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fairkv_sglang.control.server_info import guarded
from fairkv_sglang.patches import state


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"planned": {"token_imbalance": math.nan}}, "ValueError"),
        ({"rank": np.int64(1)}, "TypeError"),
        (None, "KeyError: 'ranks'"),
    ],
)
def test_what_cannot_be_told_is_a_line(
    broken: dict[str, Any] | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> dict[str, Any]:
        if broken is None:
            raise KeyError("ranks")
        return broken

    with caplog.at_level(logging.ERROR):
        assert words in guarded(make)["error"]
    assert "cannot be told" in caplog.text
    assert guarded(lambda: {"rank": 1}) == {"rank": 1}


@pytest.mark.parametrize("part", ["rank", "server"])
def test_the_internal_state_of_a_broken_rank(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's answer is kept, FairKV's part of it is the error."""

    def fail(*args: Any) -> dict[str, Any]:
        raise RuntimeError("no such tensor")

    report = SimpleNamespace(rank=lambda: {"rank": 0}, server=lambda ranks: {"enabled": True})
    setattr(report, part, fail)
    monkeypatch.setattr(
        state, "this_rank", lambda: SimpleNamespace(report=report, tp_size=1, repeats=None)
    )
    monkeypatch.setattr(state, "verify", lambda: [])
    monkeypatch.setattr(state, "_pool_tokens_held", lambda scheduler: 0)
    result = SimpleNamespace(internal_state={"max_total_num_tokens": 9})
    answer = state.after_get_internal_state(result, None).internal_state
    assert answer["max_total_num_tokens"] == 9
    assert answer["fairkv"]["error"] == "RuntimeError: no such tensor"
    json.dumps(answer, allow_nan=False)
