# SPDX-License-Identifier: Apache-2.0
"""Operations on head pages in Triton, and decode through FlashInfer; no GPU has run them yet."""
