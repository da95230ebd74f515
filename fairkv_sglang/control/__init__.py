# SPDX-License-Identifier: Apache-2.0
"""State and metrics over SGLang's scheduler channel."""
