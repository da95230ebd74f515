# SPDX-License-Identifier: Apache-2.0
"""Decode twins with the weights of a rank's lanes under a placement plan."""

from fairkv_sglang.parallel.heads import RankHeads
from fairkv_sglang.parallel.lanes import LaneChanges, LaneTable, Move
from fairkv_sglang.parallel.twins import TwinWeights

__all__ = ["LaneChanges", "LaneTable", "Move", "RankHeads", "TwinWeights"]
