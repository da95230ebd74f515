# SPDX-License-Identifier: Apache-2.0
"""One object for everything FairKV can be told: from flags, a file, the environment or a
dictionary.
"""

from __future__ import annotations

from fairkv_sglang.config.model import DEFAULT_RATIO, FairKVConfig, fields, registries
from fairkv_sglang.config.sources import (
    FILE_VARIABLE,
    FLAG,
    RESOLVED_VARIABLE,
    ConfigError,
    add_flags,
    from_environment,
    from_flags,
    from_mapping,
    merge,
    read_file,
)

__all__ = [
    "DEFAULT_RATIO",
    "FILE_VARIABLE",
    "FLAG",
    "RESOLVED_VARIABLE",
    "ConfigError",
    "FairKVConfig",
    "add_flags",
    "fields",
    "from_environment",
    "from_flags",
    "from_mapping",
    "merge",
    "read_file",
    "registries",
]
