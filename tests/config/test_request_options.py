# SPDX-License-Identifier: Apache-2.0
"""Options of a request: what they mean, one line about what is wrong, and their way to a rank."""

from __future__ import annotations

from typing import Any

import pytest

from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Keep
from fairkv_sglang.config.request_options import keep_of_text, read_request_options


def read(values: Any, prompt_len: int | None = 100) -> Keep:
    options = read_request_options(values, least_budget=33, prompt_len=prompt_len)
    assert keep_of_text(options.to_text()) == options.keep  # as the ranks read it
    return options.keep


@pytest.mark.parametrize(
    ("values", "keep"),
    [
        ({}, AS_SERVER),
        ({"compress": True}, AS_SERVER),
        ({"budget": None, "ratio": None, "protect": None}, AS_SERVER),
        ({"budget": 33}, Keep(BudgetSpec(tokens=33))),
        ({"budget": 5000}, Keep(BudgetSpec(tokens=5000))),
        ({"ratio": 0.125}, Keep(BudgetSpec(ratio=0.125))),
        ({"ratio": 1}, Keep(BudgetSpec(ratio=1.0))),
        ({"compress": False}, Keep(BudgetSpec(ratio=1.0))),
        ({"protect": []}, AS_SERVER),
        ({"protect": [[7, 7]]}, AS_SERVER),
        ({"protect": [[50, 100], [0, 5], [5, 9], [3, 4]]}, Keep(None, ((0, 9), (50, 100)))),
        ({"ratio": 0.5, "protect": [[0, 1]]}, Keep(BudgetSpec(ratio=0.5), ((0, 1),))),
    ],
)
def test_what_options_mean(values: dict[str, Any], keep: Keep) -> None:
    assert read(values) == keep


WRONG = [
    (None, r"^fairkv must map options to values, not None\.$"),
    ([1], r"^fairkv must map options to values, not \[1\]\.$"),
    ({"budgt": 64}, r"^fairkv has no option 'budgt': did you mean budget\?"),
    ({"scorer": "knorm"}, r"^fairkv has no option 'scorer'.*budget, ratio, compress, protect"),
    ({"budget": 0}, r"^fairkv\.budget: 0 must be greater than 0"),
    ({"budget": -5}, r"^fairkv\.budget: -5 must be greater than 0"),
    ({"budget": 1 << 40}, r"^fairkv\.budget: \d+ must be at most 1073741824"),
    ({"budget": 32}, r"^fairkv\.budget: 32 tokens are too few .* at least 33\.$"),
    ({"budget": "64"}, r"^fairkv\.budget: '64' is not a whole number"),
    ({"budget": 64.5}, r"^fairkv\.budget: 64\.5 is not a whole number"),
    ({"budget": True}, r"^fairkv\.budget: .*switch"),
    ({"budget": [64]}, r"^fairkv\.budget: \[64\] is not a whole number"),
    ({"ratio": 0}, r"^fairkv\.ratio: 0\S* must be greater than 0"),
    ({"ratio": 1.01}, r"^fairkv\.ratio: 1\.01 must be at most 1"),
    ({"ratio": float("nan")}, r"^fairkv\.ratio: nan "),
    ({"ratio": "half"}, r"^fairkv\.ratio: 'half' is not a number"),
    ({"compress": "no"}, r"^fairkv\.compress: "),
    ({"compress": 0}, r"^fairkv\.compress: "),
    ({"budget": 64, "ratio": 0.5}, r"^fairkv: give budget or ratio, not both\.$"),
    ({"compress": False, "ratio": 0.5}, r"^fairkv: compress false keeps everything"),
    ({"protect": 5}, r"^fairkv\.protect: "),
    ({"protect": [5, 9]}, r"^fairkv\.protect\.0: "),
    ({"protect": [[5]]}, r"^fairkv\.protect\.0: "),
    ({"protect": [[1, 2, 3]]}, r"^fairkv\.protect\.0: "),
    ({"protect": [[1, "2"]]}, r"^fairkv\.protect\.0\.1: '2' is not a whole number"),
    ({"protect": [[9, 5]]}, r"^fairkv\.protect: \[9, 5\] is no span"),
    ({"protect": [[-1, 5]]}, r"^fairkv\.protect: \[-1, 5\] is no span"),
    ({"protect": [[0, 101]]}, r"^fairkv\.protect: \[0, 101\] is beyond the prompt, which has 100"),
]


@pytest.mark.parametrize(("values", "words"), WRONG)
def test_what_is_wrong_is_one_line(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        read(values)
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))


def test_a_part_of_a_prompt_has_no_spans() -> None:
    assert read({"budget": 64}, prompt_len=None) == Keep(BudgetSpec(tokens=64))
    with pytest.raises(ValueError, match=r"^fairkv\.protect counts tokens of a whole prompt"):
        read({"protect": [[0, 5]]}, prompt_len=None)
