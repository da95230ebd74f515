# SPDX-License-Identifier: Apache-2.0
"""Runs one offline engine and answers the tests' calls on it; the benchmarks' worker does it.

``python -m fairkv_tests.engine_worker '{"fairkv": {...} or null, "engine": {...}}'``
"""

from __future__ import annotations

if __name__ == "__main__":
    from fairkv_tests import fork_server

    fork_server.begin()

    from fairkv_sglang.bench.engine.worker import work
    from fairkv_tests.engine_calls import CALLS

    work(CALLS)
