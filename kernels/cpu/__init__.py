# SPDX-License-Identifier: Apache-2.0
"""Operations on head pages in numba; see ``fairkv_sglang.kernels.interface``."""
