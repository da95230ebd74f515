# SPDX-License-Identifier: Apache-2.0
"""One rule for what was perhaps meant, of names, options and flags alike."""

from __future__ import annotations

from fairkv_sglang.config.model import unknown
from fairkv_sglang.near_miss import did_you_mean, unknown_flags
from fairkv_sglang.registry import not_one_of


def test_all_messages_ask_in_the_same_words() -> None:
    assert did_you_mean("layr", ["head", "layer"]) == ": did you mean layer?"
    assert did_you_mean("model", ["head", "layer"]) == ""
    assert not_one_of("layr", ["head", "layer"]).endswith("one of head, layer: did you mean layer?")
    assert unknown("bugdet") == "unknown option 'bugdet': did you mean budget?"
    assert unknown("xyz").startswith("unknown option 'xyz': one of ")
    assert unknown_flags(["--fairkv_budgets=3"], ["--fairkv-budget"]).endswith(
        "no flag --fairkv_budgets: did you mean --fairkv-budget?"
    )
