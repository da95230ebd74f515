# SPDX-License-Identifier: Apache-2.0
"""The plan's way from the parent, which makes it once, to the ranks, which must all have the same.

The parent writes a private temporary file and tells its children the path and a digest of its
bytes in one environment variable. A rank that reads anything else would corrupt answers in silence,
so it checks the digest.
"""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fairkv_sglang.placement.plan import Plan, digest

PLAN_VARIABLE = "FAIRKV_PLAN"
"""Environment variable from parent to children: JSON with ``path`` and ``digest`` of the plan."""


def hand_out(plan: Plan) -> str:
    """Write ``plan`` to a file that lives as long as this process; the value of ``FAIRKV_PLAN``."""
    data = plan.to_json().encode()
    handle, path = tempfile.mkstemp(prefix="fairkv-plan-", suffix=".json")  # readable by us alone
    atexit.register(_remove, path, os.getpid())
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return json.dumps({"path": path, "digest": digest(data)})


def received(environment: Mapping[str, str] = os.environ) -> Plan | None:
    """The plan that the parent handed out; None if it handed out none.

    Raises:
        ValueError: in one line, if the file is gone or is not the one that the parent wrote.
    """
    value = environment.get(PLAN_VARIABLE)
    if not value:
        return None
    told = json.loads(value)
    path = Path(told["path"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"FairKV: the parent's plan {path} cannot be read: {error.strerror}"
        ) from None
    if digest(data) != told["digest"]:
        raise ValueError(
            f"FairKV: the plan {path} has the digest {digest(data)}, the parent's has "
            f"{told['digest']}: it was changed or replaced, start again"
        )
    return Plan.from_json(data.decode())


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # a forked child leaves it alone
        Path(path).unlink(missing_ok=True)
