# SPDX-License-Identifier: Apache-2.0
"""Runs one offline engine and answers calls on it: a JSON line in, a JSON line out.

A process of its own, because SGLang kills the process that holds an engine when a rank dies, and
because an engine's settings come from the environment. Usage:
``python -m fairkv_tests.engine_worker '{"fairkv": {...} or null, "engine": {...}}'``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from fairkv_tests.engine_calls import CALLS


def main() -> None:
    """Start the engine, then serve until standard input ends."""
    options = json.loads(sys.argv[1])
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever SGLang prints goes to the log

    def answer(**message: object) -> None:
        reply.write(json.dumps(message, default=str) + "\n")
        reply.flush()

    try:
        if options["fairkv"] is None:
            from sglang import Engine

            engine = Engine(**options["engine"])
        else:
            from fairkv_sglang import Engine as FairKVEngine

            engine = FairKVEngine(fairkv=options["fairkv"], **options["engine"])
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    answer(result="ready")
    for line in sys.stdin:
        call = json.loads(line)
        try:
            if call["method"] in CALLS:
                answer(result=CALLS[call["method"]](engine, **call["arguments"]))
            else:
                answer(result=getattr(engine, call["method"])(**call["arguments"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
    engine.shutdown()


if __name__ == "__main__":
    main()
