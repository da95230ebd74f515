# SPDX-License-Identifier: Apache-2.0
"""Benchmark of whole engines: ``fairkv bench``."""
