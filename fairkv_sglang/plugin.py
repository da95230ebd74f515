# SPDX-License-Identifier: Apache-2.0
"""SGLang's general plugin entry point."""

from __future__ import annotations


def register() -> None:
    """Register FairKV's hooks with SGLang."""
