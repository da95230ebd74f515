# SPDX-License-Identifier: Apache-2.0
"""Plans and scopes are made in one place: who else calls their makers has a second recipe."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKERS = {
    # the benchmark of placements varies what a server does not
    "make_plan": {"placement/make.py", "placement/planner.py", "bench/placement.py"},
    # virtual ranks have a budget and no configuration
    "make_scope": {
        "budgets/scopes/__init__.py",
        "planning.py",
        "bench/admission.py",
        "bench/virtual/step.py",
    },
    "make_budgets": {"planning.py"},
}


def test_nobody_else_makes_plans_or_scopes() -> None:
    texts = {
        str(path.relative_to(ROOT)).removeprefix("fairkv_sglang/"): path.read_text(encoding="utf-8")
        for folder in ("fairkv_sglang", "patches", "bench", "demo")
        for path in (ROOT / folder).rglob("*.py")
    }
    for maker, allowed in MAKERS.items():
        callers = {path for path, text in texts.items() if re.search(rf"\b{maker}\(", text)}
        assert callers == allowed, maker
