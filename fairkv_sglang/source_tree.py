# SPDX-License-Identifier: Apache-2.0
"""Running from a checkout, whatever the import path says.

``kernels/`` and ``patches/`` stand beside this package in the repository and inside it once
installed; ``bench/`` stands there, too, and is not installed: ``fairkv_sglang.bench`` exists in a
checkout only. When Python finds the package through the current directory (``python -m
sglang.launch_server`` in the repository), two things go wrong: the package lacks the folders, and
they can be imported under their bare names. The second breaks transformers, which takes a folder
``kernels`` for the package of that name.
"""

from __future__ import annotations

import sys
from pathlib import Path


def settle(package_path: list[str]) -> None:
    """Make the folders importable inside the package, and only there; does nothing when installed.

    Args:
        package_path: ``__path__`` of the package, extended in place.
    """
    root = Path(package_path[0]).resolve().parent
    if not ((root / "pyproject.toml").is_file() and (root / "launch.py").is_file()):
        return
    package_path.append(str(root))
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
