# SPDX-License-Identifier: Apache-2.0
"""Plans and scopes are made in one place: who else calls their makers has a second recipe."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKERS = {
    "make_plan": {"placement/make.py", "placement/planner.py"},
    "make_scope": {"budgets/scopes/__init__.py", "planning.py"},
    "make_budgets": {"planning.py"},
}


def test_nobody_else_makes_plans_or_scopes() -> None:
    package = ROOT / "fairkv_sglang"
    files = [*package.rglob("*.py"), *(ROOT / "patches").rglob("*.py"), *ROOT.glob("demo/*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    for maker, allowed in MAKERS.items():
        callers = {path for path, text in texts.items() if re.search(rf"\b{maker}\(", text)}
        outside = callers - {package / name for name in allowed}
        # benchmarks compare recipes
        assert {path for path in outside if package / "bench" not in path.parents} == set()
