# SPDX-License-Identifier: Apache-2.0
"""CPU platform for SGLang."""

from __future__ import annotations


def activate() -> str | None:
    """Return the dotted path of the platform class, or None to stay out."""
    return None
