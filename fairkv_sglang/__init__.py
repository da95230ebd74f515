# SPDX-License-Identifier: Apache-2.0
"""FairKV for SGLang: a KV-cache budget for every head, and tensor-parallel ranks that carry equal loads."""

from __future__ import annotations

__version__ = "0.1.0"
