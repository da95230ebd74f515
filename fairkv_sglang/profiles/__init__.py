# SPDX-License-Identifier: Apache-2.0
"""Head profiles: the share of the kept tokens that each (layer, head) is expected to need."""

from __future__ import annotations

from fairkv_sglang.profiles.head_profile import HeadProfile, uniform_profile
from fairkv_sglang.profiles.read import FORMATS, read_profile
from fairkv_sglang.profiles.recorder import Recorder

__all__ = ["FORMATS", "HeadProfile", "Recorder", "read_profile", "uniform_profile"]
