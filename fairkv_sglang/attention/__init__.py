# SPDX-License-Identifier: Apache-2.0
"""SGLang attention backend over head pages; prefill on the full prompt, then compression."""
