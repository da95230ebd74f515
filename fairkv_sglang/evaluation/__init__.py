# SPDX-License-Identifier: Apache-2.0
"""What compression does to answers: tasks made from a seed, a client, statistics.

Needs neither SGLang nor FairKV on the machine that asks: any server with OpenAI's
``/v1/completions`` is measured in the same way.
"""
