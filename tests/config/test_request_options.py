# SPDX-License-Identifier: Apache-2.0
"""Options of a request: what they mean, one line about what is wrong, and their way to a rank."""

from __future__ import annotations

from typing import Any

import pytest

from fairkv_sglang.budgets import AS_SERVER, BudgetSpec, Keep, make_scorer
from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.config.request_options import keep_of_text, read_request_options

SERVER = FairKVConfig(enabled=True, pooling="avg", floor_alpha=0.1)
"""SnapKV with a window of 32, scope layer, a quarter of the prompt."""


def read(values: Any, prompt_len: int | None = 100, server: FairKVConfig = SERVER) -> Keep:
    options = read_request_options(values, server=server, prompt_len=prompt_len)
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


FLOOR = (("floor_alpha", 0.2),)


@pytest.mark.parametrize(
    ("values", "keep"),
    [
        ({"scorer": None, "scope": None}, AS_SERVER),
        ({"scorer": "keydiff"}, Keep(scorer=make_scorer("keydiff"))),
        ({"scorer": "keydiff", "window": 8}, Keep(scorer=make_scorer("keydiff", window=8))),
        # A method that is named has its own defaults, one that is not has the server's options.
        ({"scorer": "snapkv"}, Keep(scorer=make_scorer("snapkv"))),
        ({"window": 8}, Keep(scorer=make_scorer("snapkv", window=8, pooling="avg"))),
        ({"scope": "layer"}, Keep(method=("layer", FLOOR))),
        ({"scope": "uniform"}, Keep(method=("uniform", ()))),
        ({"floor_alpha": 0.5}, Keep(method=("layer", (("floor_alpha", 0.5),)))),
        (
            {"scope": "threshold", "threshold": -0.5, "ratio": 0.5},
            Keep(BudgetSpec(ratio=0.5), (), None, ("threshold", (*FLOOR, ("threshold", -0.5)))),
        ),
        (
            {"scorer": "lagkv", "lag": 9, "scope": "model", "budget": 36, "protect": [[1, 4]]},
            Keep(
                BudgetSpec(tokens=36),
                ((1, 4),),
                make_scorer("lagkv", lag=9),
                ("model", FLOOR),
            ),
        ),
    ],
)
def test_a_request_may_name_its_method(values: dict[str, Any], keep: Keep) -> None:
    found = read(values)
    assert found == keep and found.has_method == (keep != AS_SERVER)
    assert hash(found) == hash(keep)


def test_a_method_must_go_with_the_budget_of_the_server() -> None:
    """Or with one of its own."""
    server = FairKVConfig(enabled=True, budget=40)
    with pytest.raises(ValueError, match=r"^fairkv: budget: 40 tokens are too few .* 64\)"):
        read({"window": 64}, server=server)
    assert read({"window": 64, "budget": 65}, server=server).spec == BudgetSpec(tokens=65)
    assert read({"window": 64, "compress": False}, server=server).spec == BudgetSpec(ratio=1.0)


WRONG = [
    (None, r"^fairkv must map options to values, not None\.$"),
    ([1], r"^fairkv must map options to values, not \[1\]\.$"),
    ({"budgt": 64}, r"^fairkv has no option 'budgt': did you mean budget\?"),
    ({"placement": "x"}, r"^fairkv has no option 'placement': there are budget, ratio, .*, scope"),
    ({"replan": "off"}, r"^fairkv has no option 'replan'"),
    ({"scorer": "knrom"}, r"^fairkv\.scorer: 'knrom' is not one of .*did you mean knorm\?"),
    ({"scorer": ["knorm"]}, r"^fairkv\.scorer: "),
    ({"scorer": 5}, r"^fairkv\.scorer: "),
    ({"scope": {"name": "layer"}}, r"^fairkv\.scope: "),
    ({"scope": "head"}, r"^fairkv: scope head takes the share of each head from a profile"),
    ({"scorer": "knorm", "pooling": "max"}, r"^fairkv\.pooling: scorer knorm has no such option"),
    ({"pooling": "mid"}, r"^fairkv\.pooling: 'mid' is not one of max, avg"),
    ({"kernel_size": 4}, r"^fairkv: kernel_size: 4 is even"),
    ({"window": 513}, r"^fairkv\.window: 513 must be at most 512\.$"),
    ({"window": "5000"}, r"^fairkv\.window: 5000 must be at most 512\.$"),
    ({"scorer": "leverage", "sketch": 1 << 40}, r"^fairkv\.sketch: \d+ must be at most 512\.$"),
    ({"window": 0}, r"^fairkv\.window: 0 must be greater than 0"),
    ({"floor_alpha": float("nan")}, r"^fairkv\.floor_alpha: nan "),
    ({"floor_alpha": True}, r"^fairkv\.floor_alpha: .*switch"),
    ({"scorer": "lagkv", "budget": 35}, r"^fairkv\.budget: 35 .* scorer lagkv; give at least 36"),
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
