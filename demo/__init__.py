# SPDX-License-Identifier: Apache-2.0
"""The demo model: a small Llama that recalls codes from long prompts, and how it was made."""
