# SPDX-License-Identifier: Apache-2.0
"""What the first request would otherwise wait for is compiled before it comes."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch
from fairkv_sglang.attention.decoders import PageTableDecoder
from fairkv_sglang.attention.warm_up import warm_up
from fairkv_sglang.budgets.scorers.snapkv import SnapKV
from fairkv_sglang.budgets.selection import pick, pooled_counts
from fairkv_sglang.kernels import HeadPages

pages = HeadPages.create(4, 2, 2, 2, 32, torch.float32, "cpu")
warm_up(pages, PageTableDecoder(pages, (0, 2), pages.kernels.decode), SnapKV(), (0, 2), group=2)
before = set(sys.modules)
assert "fairkv_sglang.budgets.selection_cpu" in before
scores = torch.rand(2, 40)
pick(scores, 8 + pooled_counts(scores, 20, range(2)), 48)
loaded = {name for name in set(sys.modules) - before if name.startswith("fairkv_sglang")}
assert not loaded, loaded
"""


def test_selection_is_compiled_at_start() -> None:
    """Its module compiles when it is imported; a first request after installation took 8 s more."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
