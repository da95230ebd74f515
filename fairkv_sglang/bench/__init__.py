# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole engines (``fairkv bench``) and of virtual ranks (``--virtual``).

SGLang is imported only in the processes that run engines (``worker``).
"""
