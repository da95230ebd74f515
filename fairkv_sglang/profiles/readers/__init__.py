# SPDX-License-Identifier: Apache-2.0
"""Readers of other projects' per-head tables; each turns a file into a ``HeadProfile``."""
