# SPDX-License-Identifier: Apache-2.0
"""Makes helpers of the tests importable, which pytest's importlib mode does not do by itself."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("memory", "budgets", "attention", "parallel"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
