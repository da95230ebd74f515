# SPDX-License-Identifier: Apache-2.0
"""The releases of SGLang that FairKV runs on, and all that differs between them.

Imports no SGLang, so that a release that will not do is named before anything of it runs.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from typing import Any

from fairkv_sglang.config import ConfigError

OLDEST, NEWEST = "0.5.21", "0.5.23"


@cache
def installed() -> str:
    """Version of the SGLang in this environment.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"SGLang is not installed: FairKV needs {OLDEST} to {NEWEST}, e.g. "
            f"`pip install sglang=={NEWEST}`"
        ) from None


def check() -> str:
    """Make sure that the installed SGLang is one that FairKV is made for.

    Returns:
        Its version.

    Raises:
        ConfigError: one line with the version found and the range that would be right.
    """
    version = installed()
    if _numbers(OLDEST) <= _numbers(version) <= _numbers(NEWEST):
        return version
    raise ConfigError(
        f"SGLang {version} is not supported: FairKV needs {OLDEST} to {NEWEST}, e.g. "
        f"`pip install sglang=={NEWEST}`"
    )


def check_disaggregation() -> None:
    """Make sure that prefill-decode disaggregation has been tried on the installed SGLang.

    Raises:
        ConfigError: one line with the version that is right.
    """
    if _since("0.5.22"):
        raise ConfigError(
            f"--disaggregation-mode with FairKV runs on SGLang {OLDEST}, and was not tried on "
            f"{installed()}: `pip install sglang=={OLDEST}`, or leave the flag out"
        )


@cache
def _numbers(version: str) -> tuple[int, ...]:
    """``"0.5.22.post1"`` as ``(0, 5, 22)``."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _since(version: str) -> bool:
    """Whether the installed SGLang is this release or a later one."""
    return _numbers(installed()) >= _numbers(version)


def storing_method() -> str:
    """Name of a prefix cache's method that stores what a request has computed so far."""
    return "checkpoint" if _since("0.5.22") else "cache_unfinished_req"


def unlocking_methods() -> tuple[str, ...]:
    """Methods of a prefix cache that admission calls without a receipt where caching is off."""
    return () if _since("0.5.22") else ("dec_lock_ref",)


def pool_class_method() -> str:
    """Name of a platform's method that names the class of its KV pool."""
    return "get_kv_pool_cls" if _since("0.5.22") else "get_mha_kv_pool_cls"


def reserves_whole_outputs() -> bool:
    """Whether a request is admitted only if all tokens that it may write have room."""
    return _since("0.5.22")


def forgets_preempted() -> bool:
    """Whether the scheduler drops requests that it preempted for one that then was not admitted."""
    return not _since("0.5.22")


def keep_prefix(cache: Any, req: Any, up_to: int) -> None:
    """Put the first ``up_to`` tokens of a request into the tree, before its row is freed."""
    if _since("0.5.22"):
        cache.checkpoint(req, up_to=up_to)
    else:
        cache.insert_req(req, up_to=up_to)


def let_go_of_prefix(cache: Any, req: Any) -> None:
    """Unlock what a request holds of the tree, and forget the slots of its prefix.

    From 0.5.22 on a request carries its lock, and a length in place of a copy of the slots.
    """
    import torch

    if _since("0.5.22"):
        cache.unlock(req.lock)
        req.lock = None
    else:
        cache.unpin(req)
        req.prefix_indices = torch.empty((0,), dtype=torch.int64)
    req.last_node = None
