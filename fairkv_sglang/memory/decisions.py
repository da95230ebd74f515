# SPDX-License-Identifier: Apache-2.0
"""What a rank has decided, in a form that ranks can compare."""

from __future__ import annotations

import hashlib
import logging
from collections import deque

logger = logging.getLogger(__name__)


class DecisionLog:
    """Digest of the decisions of this rank; equal on all ranks, or something is wrong."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.count = 0
        self.recent: deque[str] = deque(maxlen=4096)
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, what: str, row: int, detail: bytes = b"") -> None:
        """Record one decision."""
        self.count += 1
        self._hash.update(f"{what} {row} ".encode() + detail)
        if self.verbose:
            short = hashlib.blake2b(detail, digest_size=4).hexdigest()
            line = f"{self.count} {what} row {row} {short}"
            self.recent.append(line)
            logger.info("FairKV decision %s", line)

    @property
    def digest(self) -> str:
        """Hex digest over all decisions so far."""
        return self._hash.hexdigest()
