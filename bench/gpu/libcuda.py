# SPDX-License-Identifier: Apache-2.0
"""The driver's library where a linker finds it: toolkits from wheels have no stub of it.

FlashInfer links what it compiles with `-lcuda`. A linker looks for `libcuda.so`, a driver installs
`libcuda.so.1`, and the stub that stands for it belongs to a part of the CUDA toolkit that is often
not there.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def link_driver(folder: Path, name: str = "libcuda.so.1") -> str:
    """Put a link to the loaded driver into the folder and the folder on the linker's path.

    Returns:
        Where the driver is; nothing, and nothing done, if there is none.
    """
    try:
        ctypes.CDLL(name)
    except OSError:
        return ""
    base = name[: name.index(".so") + 3]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found = next((x.split()[-1] for x in maps if Path(x.split()[-1]).name.startswith(base)), "")
    if found:
        (folder / base).symlink_to(found)
        os.environ["LIBRARY_PATH"] = os.pathsep.join(
            [str(folder), *filter(None, [os.environ.get("LIBRARY_PATH")])]
        )
    return found
