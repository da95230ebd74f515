# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fairkv_sglang.attention.groups import groups


@given(sizes=st.lists(st.integers(0, 20), max_size=12), limit=st.integers(0, 40))
def test_groups_are_as_few_as_neighbours_that_fit(sizes: list[int], limit: int) -> None:
    found = groups(sizes, limit)
    assert [i for group in found for i in group] == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in group) for group in found]
    assert all(
        total <= limit or len(group) == 1 for total, group in zip(totals, found, strict=True)
    )
    if any(sizes):
        for total, after in zip(totals, found[1:], strict=False):
            assert total + sizes[after[0]] > limit
    else:
        assert all(len(group) == 1 for group in found)
