# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' worker with a quicker start, see ``fork_server.py``."""

from __future__ import annotations

if __name__ == "__main__":
    from fairkv_tests import fork_server

    fork_server.begin()

    from fairkv_sglang.bench.engine.calls import serve, state
    from fairkv_sglang.bench.engine.worker import work

    work({"state": state, "serve": serve})
