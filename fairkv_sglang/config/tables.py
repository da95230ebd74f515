# SPDX-License-Identifier: Apache-2.0
"""The tables of methods and their options in ``docs/``: ``python -m fairkv_sglang.config.tables``.

Written between a line ``<!-- methods of FIELD -->`` and a line ``<!-- end -->``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from fairkv_sglang.config.model import registries
from fairkv_sglang.config.sources import metavar

PAGES = ("budgets.md", "placement.md")
_TABLE = re.compile(r"(<!-- methods of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SIGNS = {Gt: "> {0.gt}", Ge: "≥ {0.ge}", Lt: "< {0.lt}", Le: "≤ {0.le}"}


def filled(text: str) -> str:
    """The page with its tables made anew."""
    return _TABLE.sub(lambda match: match[1] + table(match[2]) + match[3], text)


def table(field: str) -> str:
    """Methods of a field and options of each, as Markdown."""
    methods = registries()[field]
    lines = ["| name | what | options (default) |", "|---|---|---|"]
    options: dict[str, FieldInfo] = {}
    for name in methods:
        options |= methods.options(name)
        own = [f"`{key}` {_value(info)}" for key, info in methods.options(name).items()]
        lines.append(f"| `{name}` | {methods[name].summary} | {', '.join(own) or 'none'} |")
    lines += ["", "| option | values | meaning |", "|---|---|---|"]
    for key, info in options.items():
        signs = [
            _SIGNS[type(bound)].format(bound) for bound in info.metadata if type(bound) in _SIGNS
        ]
        values = " ".join([f"`{metavar(key, info)}`", *signs])
        lines.append(f"| `{key}` | {values} | {info.description} |")
    return "\n".join(lines) + "\n"


def _value(info: FieldInfo) -> Any:
    return "unset" if info.default is None else info.default


if __name__ == "__main__":
    for name in PAGES:
        page = Path("docs") / name
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
