# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own, for benchmarks and tests: a JSON line in, a JSON line out.

SGLang kills the process that holds an engine when a rank dies, and ranks take settings from the
environment, so engines of different settings cannot share a process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Calls = Mapping[str, Callable[..., Any]]


def work(calls: Calls) -> None:
    """Start the engine of ``sys.argv[1]``, then answer until standard input ends.

    A call is ``{"method": ..., "arguments": {...}}``: one of ``calls``, which gets the engine as
    its first argument, or a method of the engine.
    """
    options = json.loads(sys.argv[1])
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever SGLang prints goes to the log

    def answer(**message: object) -> None:
        reply.write(json.dumps(message, default=str) + "\n")
        reply.flush()

    try:
        engine = start(options)
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    answer(result="ready")
    for line in sys.stdin:
        try:
            call = json.loads(line)
            name, arguments = call["method"], call["arguments"]
            if name in calls:
                answer(result=calls[name](engine, **arguments))
            else:
                answer(result=getattr(engine, name)(**arguments))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")
    engine.shutdown()


def start(options: dict[str, Any]) -> Any:
    """The engine of ``{"fairkv": {...} or null, "engine": {...}}``; stock SGLang for null."""
    if options["fairkv"] is None:
        from sglang import Engine

        return Engine(**options["engine"])
    from fairkv_sglang import Engine as FairKVEngine

    return FairKVEngine(fairkv=options["fairkv"], **options["engine"])
