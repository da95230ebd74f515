# SPDX-License-Identifier: Apache-2.0
"""Plain transformers beside a CPU torch."""

from __future__ import annotations

import subprocess
import sys


def test_models_can_be_imported_by_a_process_that_knows_nothing_of_fairkv() -> None:
    program = (
        "import sys; from transformers import LlamaForCausalLM; import torchvision.ops;"
        "assert 'fairkv_sglang' not in sys.modules; print(LlamaForCausalLM.__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.strip() == "LlamaForCausalLM", run.stderr
