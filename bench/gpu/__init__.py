# SPDX-License-Identifier: Apache-2.0
"""Checks and timings of the CUDA kernels; `bench/gpu_check.py` runs them in one call.

Needs torch alone: Triton, FlashInfer, numba and SGLang are imported where they are used, and what
is not installed is reported as not run.
"""
