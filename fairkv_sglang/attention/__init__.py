# SPDX-License-Identifier: Apache-2.0
"""Attention of a rank: prompts are compressed after it, decode runs over head pages."""
