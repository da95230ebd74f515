# SPDX-License-Identifier: Apache-2.0
"""SGLang on the CPU platform of this package, FairKV off; and what the flags do before a start."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fairkv_sglang.placement import make_plan
from fairkv_tests.engine_process import LAUNCH, EngineProcess
from fairkv_tests.tiny_models import hugging_face_outputs, random_prompts

PROMPTS = random_prompts([1, 7, 50, 200, 333], vocab=512)
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[..., Path]) -> list[list[int]]:
    """What Hugging Face generates."""
    return hugging_face_outputs(tiny_model(kv_heads=2), PROMPTS, NEW_TOKENS)


@pytest.mark.sweep  # test_plugin_off and test_prefill have such engines at TP 1 and 2
@pytest.mark.parametrize(
    "arguments",
    [
        {"tp_size": 1},
        {"tp_size": 1, "page_size": 16, "chunked_prefill_size": 64},
        {"tp_size": 2},
        {"tp_size": 4},
    ],
    ids=["tp1", "tp1-pages-of-16", "tp2", "tp4-fewer-kv-heads-than-ranks"],
)
def test_stock_engine_equals_hugging_face(
    tiny_model: Callable[..., Path],
    start_engine: Callable[..., EngineProcess],
    expected: list[list[int]],
    arguments: dict[str, int],
) -> None:
    """Scheduler, radix cache, page allocator and gloo collectives give the model's own tokens."""
    engine = start_engine(tiny_model(kv_heads=2), **arguments)
    assert engine.generate(PROMPTS, NEW_TOKENS) == expected
    # once more, now with every prompt in the prefix cache
    assert engine.generate(PROMPTS, NEW_TOKENS) == expected
    assert "FairKV" not in engine.log
    engine.close()


def _python(
    *command: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


_INSTALLED = """
import importlib.util, json, sglang
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
from sglang.srt.mem_cache.registry import registered_radix_cache_backends as radix
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS as attention
import fairkv_sglang.kernels, fairkv_sglang.patches
print(json.dumps({
    "hooks": sorted(HookRegistry._hooks),
    "applied": sorted(HookRegistry._patched),
    "radix": radix(),
    "attention": "fairkv" in attention,
    "cpu": attention["torch_native"].__module__,
    "found": [name for name in ("kernels", "patches") if importlib.util.find_spec(name)],
    "package": [fairkv_sglang.kernels.__file__, fairkv_sglang.patches.__file__],
}))
"""


def test_plugin_changes_nothing_when_fairkv_is_off() -> None:
    """Only the argument hooks are there, and those that the CPU platform needs."""
    result = _python("-c", _INSTALLED, cwd=LAUNCH.parent)  # where kernels/ and patches/ are
    assert result.returncode == 0, result.stderr
    state = json.loads(result.stdout.splitlines()[-1])
    server_args = "sglang.srt.server_args.ServerArgs"
    assert state["hooks"] == [
        "sglang.srt.arg_groups.model_hook.attention_backends_of",
        "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments",
        "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        f"{server_args}.add_cli_args",
        f"{server_args}.from_cli_args",
        f"{server_args}.resolve_once",
    ]
    assert state["applied"] == state["hooks"]
    assert "fairkv" not in state["radix"] and not state["attention"]
    assert state["cpu"] == "sglang.srt.layers.attention.attention_registry"
    root = LAUNCH.parent
    assert state["package"] == [
        str(root / "kernels/__init__.py"),
        str(root / "patches/__init__.py"),
    ]
    assert state["found"] == [], "kernels/ and patches/ must not be top-level modules"


# Several starts in one process: the way of sglang.launch_server up to the first weight.
_STARTS = """
import contextlib, io, json, sys
import sglang
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
answers = []
for argv in json.loads(sys.argv[1]):
    errors = io.StringIO()
    status = 0
    try:
        with contextlib.redirect_stderr(errors):
            prepare_server_args(argv).resolve_once()
    except SystemExit as end:
        status = end.code
    answers.append([status, [l for l in errors.getvalue().splitlines() if l.startswith("error: ")]])
print(json.dumps(answers))
"""


def test_wrong_command_lines(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """One line each and status 2, before a weight is loaded; without the mistake they pass.

    Many more cases are in tests/config; these go the whole way of SGLang's command.
    """
    plan = tmp_path / "plan.json"
    make_plan("contiguous", np.ones((3, 8)), 2).to_file(plan)
    wrong = {
        "--fairkv --fairkv-scorer h3o": "--fairkv-scorer: 'h3o' is not one of compactor",
        "--fairkv-budget 64": "--fairkv-budget is given but FairKV is off",
        "--fairkv --pp-size 2": "pipeline parallelism (--pp-size above 1)",
        "--fairkv --kv-cache-dtype fp8_e5m2": "a quantised KV cache (--kv-cache-dtype)",
        "--fairkv --decode-attention-backend torch_native": "another decode attention",
        "--tp-size 3": "--tp-size 3: 8 query heads, 2 KV heads",
        "--tp-size 3 --fairkv": "--tp-size 3: 8 query heads, 2 KV heads",
        f"--tp-size 2 --fairkv --fairkv-plan {plan}": str(plan),
        f"--tp-size 4 --fairkv --fairkv-plan {plan}": "TP 2",
        "--fairkv --fairkv-scope head": "takes the share of each head from a profile",
    }
    right = [
        "--tp-size 2",
        "--fairkv --fairkv-budget 64",
        "--tp-size 2 --fairkv",
        "--tp-size 4 --fairkv",  # fewer KV heads than ranks
        "--fairkv --attention-backend torch_native",
        "--fairkv --prefill-attention-backend torch_native",
        "--fairkv --load-format safetensors",
        "--fairkv --load-format dummy",
    ]
    model = ["--model-path", str(tiny_model(kv_heads=2))]
    starts = [[*model, *line.split()] for line in [*wrong, *right]]
    result = _python("-P", "-c", _STARTS, json.dumps(starts))
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    for (line, words), (status, errors) in zip(wrong.items(), answers, strict=False):
        assert status == 2, line
        assert len(errors) == 1 and words in errors[0], (line, errors)
    assert answers[len(wrong) :] == [[0, []]] * len(right)


@pytest.mark.parametrize("module", [False, True], ids=["launch.py", "sglang.launch_server"])
def test_help_shows_both_groups(module: bool) -> None:
    """FairKV's flags stand beside SGLang's."""
    result = _python(*(["-m", "sglang.launch_server"] if module else [str(LAUNCH)]), "--help")
    assert result.returncode == 0, result.stderr
    assert "--mem-fraction-static" in result.stdout
    assert "\nFairKV:" in result.stdout and "--fairkv-budget" in result.stdout


_PARSER = """
import argparse, sglang
from sglang.srt.server_args import ServerArgs
from sglang.srt.plugins.hook_registry import HookRegistry
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print("--fairkv-budget" in parser._option_string_actions, len(HookRegistry._patched))
"""


def test_a_program_that_loads_no_plugins_has_the_flags_if_it_asks_for_them(tmp_path: Path) -> None:
    """As SGLang's benchmarks do; a process that does not name FairKV stays as it is."""
    file = tmp_path / "fairkv.yaml"
    file.write_text("")
    for words, environment in ((["--fairkv"], {}), ([], {"FAIRKV_CONFIG": str(file)})):
        result = _python("-P", "-c", _PARSER, *words, **environment)
        assert result.stdout.splitlines()[-1].startswith("True"), result.stderr
    result = _python("-P", "-c", _PARSER, "--tp", "2")
    assert result.stdout.splitlines()[-1] == "False 0", result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--fairkv", "--fairkv-scope", "token"], {}, "'token' is not one of head, layer"),
        (["--fairkv"], {"SGLANG_PLUGINS": "other"}, "SGLANG_PLUGINS=other"),
        (["--fairkv"], {"SGLANG_PLATFORM": "other"}, "SGLANG_PLATFORM=other"),
    ],
    ids=["flag", "plugin-hidden", "plugin-hidden-by-platform"],
)
def test_launch_ends_with_status_2_and_one_line(
    arguments: list[str], environment: dict[str, str], words: str
) -> None:
    """No traceback; a plugin that SGLang would leave out without a word is reported."""
    result = _python(str(LAUNCH), "--model-path", "nowhere", *arguments, **environment)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2
    assert len(errors) == 1 and words in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", [False, True], ids=["launch.py", "sglang.launch_server"])
def test_a_port_in_use_is_noticed_before_a_model_is_loaded(
    tiny_model: Callable[..., Path], module: bool
) -> None:
    model = tiny_model(kv_heads=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = _python(
            *(["-m", "sglang.launch_server"] if module else [str(LAUNCH)]),
            *("--model-path", str(model), "--device", "cpu", "--fairkv"),
            *("--host", "127.0.0.1", "--port", port),
        )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1 and f"--port {port}: the server cannot listen there" in errors[0]
    assert "Traceback" not in result.stderr and "Load weight" not in result.stderr


def test_engine_and_environment_refuse_alike(
    tiny_model: Callable[..., Path], start_engine: Callable[..., EngineProcess], tmp_path: Path
) -> None:
    """Stock Engine with FAIRKV_CONFIG and FairKV's Engine raise the same error."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model(kv_heads=2), model)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["GemmaForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    file = tmp_path / "fairkv.yaml"
    file.write_text("budget: 64\n")
    for options in ({"fairkv": {"budget": 64}}, {"environment": {"FAIRKV_CONFIG": str(file)}}):
        with pytest.raises(RuntimeError, match=r"ConfigError.*this architecture.*LlamaForCausal"):
            start_engine(model, **options)
