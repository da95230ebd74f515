# SPDX-License-Identifier: Apache-2.0
"""A start in miniature: the real engine with FairKV on a model of two layers, in its own process.

It goes where a server goes (pools, prefix cache, admission, attention backend, decode, sampler),
and needs no checkpoint: weights are random, prompts are token ids.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PROMPT, NEW = 600, 8
SECONDS = 600
_DONE = "trial start: done"
_LOST = re.compile(r"(?:[\w.]+(?:Error|Exception|Exit)|error): .+", re.MULTILINE)


def trial_start() -> str:
    """Start, answer one request, stop.

    Returns:
        What was done, in a line.

    Raises:
        RuntimeError: with the first error that the engine's processes wrote.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fairkv-check-") as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, folder],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"a start with FairKV was not ready after {SECONDS} s") from None
    if _DONE not in done.stdout:
        reason = _LOST.search(done.stderr)
        end = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise RuntimeError(f"a start with FairKV ends: {reason.group() if reason else end[0]}")
    return (
        f"started a model of 2 layers and decoded {NEW} tokens, {time.monotonic() - started:.0f} s"
    )


def main(folder: str) -> None:
    """What the child does."""
    import torch

    from fairkv_sglang import Engine

    engine = Engine(
        model_path=folder,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_total_tokens=8192,
        max_running_requests=8,
        chunked_prefill_size=256,
        log_level="warning",
        fairkv={"ratio": 0.25},
    )
    answer = engine.generate(
        input_ids=list(range(3, 503)) + list(range(3, PROMPT - 497)),
        sampling_params={"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True},
    )
    state = engine.get_server_info()["internal_states"][0]["fairkv"]
    if len(answer["output_ids"]) != NEW or not state["kept"]["prompts"]:
        raise RuntimeError(f"{len(answer['output_ids'])} tokens, {state['kept']}")
    print(_DONE, flush=True)
    # Nothing to save: the processes need not be shut down one after the other.
    engine.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
