# SPDX-License-Identifier: Apache-2.0
"""Kept rows of prompts from a prefill server to a decode server: handshake, sockets, gather."""
