# SPDX-License-Identifier: Apache-2.0
"""What the pages say is what the code does: generated parts, commands and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fairkv_sglang.architectures import families
from fairkv_sglang.cli.ledger_page import ledger_markdown
from fairkv_sglang.cli.main import COMMANDS
from fairkv_sglang.config import fields
from fairkv_sglang.support import table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def test_support_page_lists_every_refusal() -> None:
    assert table() in (ROOT / "docs" / "support.md").read_text(encoding="utf-8")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_names_every_model() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| models | {families()} (" in text


def test_ledger_page_is_the_ledger() -> None:
    page = (ROOT / "docs" / "patch-ledger.md").read_text(encoding="utf-8")
    how = "run `fairkv check --ledger --markdown > docs/patch-ledger.md`"
    assert ledger_markdown() == page, how


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = {"config"}
    for name, _, _ in fields():  # test switches have a short name, too
        known |= {part.replace("_", "-").replace(".", "-") for part in (name, name.split(".")[-1])}
    for flag in re.findall(r"--fairkv-([a-z-]*[a-z])", text):
        assert flag in known, f"{page.name}: --fairkv-{flag}"
    for command in re.findall(r"`fairkv ([a-z]+)", text):
        assert command in COMMANDS, f"{page.name}: fairkv {command}"
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for target in re.findall(r"`make ([a-z]+)", text):
        assert target in targets, f"{page.name}: make {target}"
