# SPDX-License-Identifier: Apache-2.0
"""Makes a CUDA build of torchvision importable beside a CPU build of torch.

SGLang imports torchvision through an image processor even for text models, and transformers does
for its own. Torchvision's default wheel is a CUDA build: its operator library cannot be loaded
without CUDA, and the package then registers fake implementations for two operators that nobody has
declared, which is an error. FairKV's own processes call :func:`make_torchvision_importable`; run as
a script, this file makes all processes of an environment do so (``make install``).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class TorchvisionFinder:
    """Declares torchvision's operators at the first look-up of ``torchvision``.

    The import itself is left to the finders after it. The operators then exist but cannot be
    called; transforms work.
    """

    def __init__(self) -> None:
        self._library: object | None = None  # torch drops the declarations with the last reference

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Declare the operators if ``name`` is ``torchvision``; always None, "not found here"."""
        if name == "torchvision" and self._library is None:
            sys.meta_path.remove(self)  # the look-up below must not come back here
            try:
                spec = importlib.util.find_spec(name)
            finally:
                sys.meta_path.insert(0, self)
            if spec is not None and spec.origin is not None:
                self._declare(Path(spec.origin).with_name("_C.so"))
        return None

    def _declare(self, operators: Path) -> None:
        import torch

        if torch.version.cuda is not None:
            return
        try:  # a CPU build of torchvision brings the operators with it
            torch.ops.load_library(operators)
            return
        except OSError:
            pass
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        self._library = library


def make_torchvision_importable() -> None:
    """Install :class:`TorchvisionFinder` once in this process."""
    if "torchvision" in sys.modules:
        return
    # by name: a start-up file runs this module under another one
    if not any(type(finder).__name__ == TorchvisionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())  # type: ignore[arg-type]


def at_every_start() -> None:
    """Let every process of this Python environment begin with :func:`make_torchvision_importable`.

    Writes a start-up file (``.pth``, see Python's ``site``) that runs this file where it stands.
    """
    folder = Path(sysconfig.get_path("purelib"))
    line = f"import runpy; runpy.run_path({__file__!r})['make_torchvision_importable']()"
    (folder / "fairkv_torchvision.pth").write_text(line + "\n")


if __name__ == "__main__":
    at_every_start()
