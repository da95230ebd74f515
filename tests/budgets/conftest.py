# SPDX-License-Identifier: Apache-2.0
"""kvpress, where it is installed, for the tests that compare with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fairkv_sglang.budgets.scorers.leverage import sketching


@pytest.fixture(scope="module")
def kvpress() -> Iterator[Any]:
    """kvpress, without what its import does to transformers' attention in the whole process."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        yield pytest.importorskip(
            "kvpress", reason="kvpress is not installed (requirements/kvpress.txt)"
        )
    finally:
        for name, function in before.items():
            ALL_ATTENTION_FUNCTIONS[name] = function


@pytest.fixture
def same_sketch() -> Iterator[None]:
    """kvpress draws the numbers of a sketch anew for every head and prompt; ours are fixed."""

    real = torch.randn

    def drawn(*shape: int, **options: Any) -> Tensor:
        if "generator" in options:  # ours
            return real(*shape, **options)
        return (sketching(*shape[-2:], torch.device("cpu")) * math.sqrt(shape[-1])).expand(shape)

    with mock.patch.object(torch, "randn", drawn):
        yield
