# SPDX-License-Identifier: Apache-2.0
"""The decode step of a tensor-parallel group, on one device: ``fairkv bench --virtual``."""
