# SPDX-License-Identifier: Apache-2.0
"""What the nodes of one server were given is compared by content."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairkv_sglang.config import FairKVConfig
from fairkv_sglang.nodes import difference, given
from fairkv_tests.workloads import write_profile


def config(**options: object) -> FairKVConfig:
    return FairKVConfig(enabled=True, **options)


def test_the_same_files_at_other_places_are_the_same(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [write_profile(tmp_path / folder) for folder in ("a", "b")]
    first, second = (given(config(profile=path, budget=64)) for path in paths)
    assert difference({0: first, 1: second, 2: first}) is None
    Path(paths[1]).write_text(Path(paths[1]).read_text() + "\n")
    line = difference({0: first, 1: given(config(profile=paths[1], budget=64))})
    assert line is not None and "on node 1 than on node 0: profile file " in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 128}, "budget 128 instead of 64"),
        ({"budget": 64, "window": 8}, "window 8 instead of 32"),
        ({"budget": 64, "scorer": "knorm"}, "scorer knorm instead of snapkv"),
        ({"budget": 64, "log_decisions": True}, "debug "),
    ],
)
def test_a_difference_is_named_in_one_line(options: dict[str, object], words: str) -> None:
    same, other = given(config(budget=64)), given(config(**options))
    line = difference({0: same, 1: same, 2: other})
    assert line is not None and "\n" not in line
    assert f"on node 2 than on node 0: {words}" in line
    assert "give every node the same FairKV flags and the same files" in line


def test_another_version_is_a_difference() -> None:
    first = given(config(budget=64))
    line = difference({0: first, 1: {**first, "version": "0.0.9"}})
    assert line is not None and "version 0.0.9 instead of " in line
