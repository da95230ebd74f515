# SPDX-License-Identifier: Apache-2.0
"""Start an SGLang server with FairKV: ``python launch.py --model-path DIR --fairkv ...``.

Takes every flag of SGLang's server and the ``--fairkv`` flags; ``--help`` shows both.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The folders kernels/ and patches/ beside this file must not be importable under these names:
# `kernels` is a package that transformers looks for.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]


def main() -> None:
    """Run the server; the package must be installed (see README)."""
    try:
        from fairkv_sglang.server import launch
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {error.name} is not installed: run `make install` and use .venv/bin/python, "
            "or `pip install --no-deps .` beside an SGLang that is already there"
        )
    launch(sys.argv[1:])


if __name__ == "__main__":
    main()
