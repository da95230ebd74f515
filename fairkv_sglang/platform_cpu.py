# SPDX-License-Identifier: Apache-2.0
"""SGLang's platform entry point: the CPU platform, where there is no accelerator.

SGLang imports this module first of all in every process, with and without an accelerator, so the
import of torchvision is prepared here, and a process that names FairKV begins
(``plugin.begin``). Nothing of SGLang is imported.
"""

from __future__ import annotations

import os
import sys

from fairkv_sglang.cpu_environment import has_accelerator
from fairkv_sglang.torchvision_finder import make_torchvision_importable

make_torchvision_importable()
if any("fairkv" in word.lower() for word in (*sys.argv, *os.environ)):
    from fairkv_sglang.plugin import begin

    begin()


def activate() -> str | None:
    """Return the dotted path of the platform's class, or None where SGLang has one of its own."""
    if has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    return "fairkv_sglang.patches.cpu_platform.CpuPlatform"
