# SPDX-License-Identifier: Apache-2.0
"""Benchmarks. They live in a checkout and are not installed with the package.

In a checkout this folder is ``fairkv_sglang.bench`` (see ``fairkv_sglang/source_tree.py``), so that
nothing in it can be imported under a bare name:

    fairkv bench                               engines side by side (``engine/``), and with
                                               --virtual models of real size (``virtual/``)
    python -m fairkv_sglang.bench.placement    policies and router on head profiles
    python -m fairkv_sglang.bench.replan       re-planning while serving
    python -m fairkv_sglang.bench.accuracy     what budgets cost in answers
    python -m fairkv_sglang.bench.scorer_cost  what scorers cost before the first token
    python -m fairkv_sglang.bench.long_outputs what compressing outputs costs in answers
    python -m fairkv_sglang.bench.cpu_kernels  the CPU decode kernel
    python -m fairkv_sglang.bench.gpu_check    everything that runs on CUDA (``gpu/``)
"""
