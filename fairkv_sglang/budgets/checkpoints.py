# SPDX-License-Identifier: Apache-2.0
"""Trained weights of a scorer: a folder with ``*.safetensors`` and ``config.json``.

Both are data: nothing in the folder is run, and no other file of it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


class Checkpoint:
    """Names and shapes of the tensors, read when it is opened; the tensors when they are asked for.

    Args:
        folder: The folder.

    Raises:
        ValueError: in one line, for a folder without readable safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise self._error("there is no such folder")
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118, no mapping
                        self._file_of[name] = file
                        self._shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise self._error(f"{file.name} cannot be read: {error}") from None
        if not self._shapes:
            raise self._error("it has no *.safetensors, which alone are read")

    @property
    def names(self) -> Iterable[str]:
        """Of all tensors."""
        return self._shapes.keys()

    def config(self) -> dict[str, Any]:
        """``config.json``.

        Raises:
            ValueError: in one line, if it is missing or no JSON object.
        """
        try:
            data = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._error(f"config.json cannot be read: {reason}") from None
        if not isinstance(data, dict):
            raise self._error("config.json is no JSON object")
        return data

    def require(self, what: str, found: object, wanted: object) -> None:
        """ValueError, in one line, if a size is not the model's."""
        if found != wanted:
            raise self._error(f"{what} is {found}, this model needs {wanted}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; ValueError, in one line, if there is none of this name."""
        if name not in self._shapes:
            raise self._error(f"it has no tensor {name}")
        return self._shapes[name]

    def require_shape(self, name: str, shape: Sequence[int]) -> None:
        """ValueError, in one line, unless there is such a tensor."""
        self.require(f"the shape of {name}", list(self.shape(name)), list(shape))

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, in the type that it is stored in."""
        self.shape(name)
        with safe_open(self._file_of[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()  # not the file's own memory
        return tensor

    def _error(self, text: str) -> ValueError:
        return ValueError(f"scorer checkpoint {self.folder}: {' '.join(text.split())}")
