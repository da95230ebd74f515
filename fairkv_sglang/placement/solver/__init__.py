# SPDX-License-Identifier: Apache-2.0
"""How policies solve a :class:`~fairkv_sglang.placement.solver.problem.Problem`.

A layer's level by number of copies (``curves``), copies of each layer (``choose``), lane slots
(``slots``), spare copies (``spare``), rows that stay at home (``stay``), and which rank takes which
part (``deal``). Of the rest of the placement it imports ``homes`` and ``options`` alone.
"""
