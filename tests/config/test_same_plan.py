# SPDX-License-Identifier: Apache-2.0
"""``fairkv plan``, ``fairkv check`` and the server make the same plan of the same flags."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sglang  # noqa: F401  brings its platform, which must precede its other modules

from fairkv_sglang.cli.main import main
from fairkv_sglang.cli.preview import describe
from fairkv_sglang.config import RESOLVED_VARIABLE, add_flags, from_environment, from_flags
from fairkv_sglang.model import Model
from fairkv_sglang.patches import server_args
from fairkv_sglang.placement import Plan
from fairkv_sglang.plan_file import PLAN_VARIABLE, received
from fairkv_sglang.planning import make_start
from fairkv_sglang.profiles import HeadProfile

LAYERS, HEADS = 3, 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with nothing but a model's config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": HEADS,
        "intermediate_size": 1024, "vocab_size": 128, "max_position_embeddings": 32768,
        "torch_dtype": "float32", "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (RESOLVED_VARIABLE, PLAN_VARIABLE):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(server_args._State, "command_line", None)
    yield


def profile(tmp_path: Path, seed: int) -> str:
    shares = np.random.default_rng(seed).lognormal(0.0, 1.2, (LAYERS, HEADS))
    path = tmp_path / f"profile-{seed}.json"
    HeadProfile(model="m", shares=shares, meta={}).save(path)
    return str(path)


def as_the_server(model: Path, dtype: str) -> Model:
    """As the server reads them, with SGLang's own model configuration."""
    from sglang.srt.configs.model_config import ModelConfig

    return Model.from_sglang(ModelConfig(str(model), dtype=dtype))


ONE_SERVER = {"disaggregation_mode": "null", "disaggregation_transfer_backend": "mooncake"}


def of_the_server(
    model: Path, tp_size: int, device: str, dtype: str, flags: list[str]
) -> tuple[Plan, dict[str, object]]:
    """What the arguments' own hook hands out, and what ``fairkv check`` says of it.

    SGLang's resolution is replaced by nothing: it needs the device.
    """
    parser = argparse.ArgumentParser()
    add_flags(parser)
    server_args.before_from_cli_args(object, parser.parse_args(["--fairkv", *flags]))
    arguments = SimpleNamespace(
        model_path=str(model),
        tp_size=tp_size,
        device=device,
        cuda_graph_backend_prefill=None,
        **ONE_SERVER,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_args, "read_model", lambda _: as_the_server(model, dtype))
        patch.setattr("sglang.srt.arg_groups.overrides.resolving_view", lambda view: view)
        patch.setattr("fairkv_sglang.patches.cpu_platform.is_active", lambda: device == "cpu")
        patch.setattr(server_args, "_settle_cpu", lambda _: None)
        for name in ("_settle", "_check_devices", "_check_memory"):  # of this machine
            patch.setattr(server_args, name, lambda *_: None)
        server_args.around_resolve(lambda _: None, arguments)
    plan, config = received(), from_environment()
    assert plan is not None and config is not None
    start = make_start(config, as_the_server(model, dtype), tp_size, device, plan)
    return plan, describe(start)


CASES = [
    (2, "cuda", "auto", []),
    (4, "cuda", "bfloat16", ["--fairkv-scope", "head", "--fairkv-budget", "700"]),
    (8, "cpu", "float32", ["--fairkv-expected-batch", "128"]),
    (4, "cpu", "auto", ["--fairkv-scope", "rank", "--fairkv-window", "64"]),
    (2, "cpu", "float32", ["--fairkv-placement", "best_effort", "--fairkv-scope", "head"]),
    (8, "cuda", "auto", ["--fairkv-placement", "equal_shares", "--fairkv-ratio", "0.1"]),
    (4, "cuda", "auto", ["--fairkv-placement", "contiguous", "--fairkv-scope", "uniform"]),
    (4, "cuda", "auto", ["--fairkv-expected-prompt", "32768", "--fairkv-max-copies", "1"]),
    (2, "cuda", "auto", ["--fairkv-placement", "exact"]),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("tp_size", "device", "dtype", "flags"), CASES)
def test_command_check_and_server_agree(
    tp_size: int, device: str, dtype: str, flags: list[str], seed: int, model: Path, tmp_path: Path
) -> None:
    flags = [*flags, "--fairkv-profile", profile(tmp_path, seed)]
    served, said = of_the_server(model, tp_size, device, dtype, flags)
    out = tmp_path / "plan.json"
    words = ["plan", "--tp", str(tp_size), "--model-path", str(model), "--device", device]
    assert main([*words, "--dtype", dtype, "--out", str(out), "--compare", "", *flags]) == 0
    made = Plan.from_file(out)
    assert made.layers == served.layers
    assert made.digest == served.digest == said["plan digest"]


def test_a_plan_file_goes_the_same_way(model: Path, tmp_path: Path) -> None:
    flags = ["--fairkv-profile", profile(tmp_path, 3)]
    out = tmp_path / "plan.json"
    words = ["plan", "--tp", "2", "--model-path", str(model), "--compare", "", "--out", str(out)]
    assert main([*words, *flags, "--fairkv-placement", "equal_shares"]) == 0
    served, _ = of_the_server(model, 2, "cuda", "auto", ["--fairkv-plan", str(out)])
    assert served == Plan.from_file(out)


def test_another_start_gets_no_plan_of_an_earlier_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_args, "_check_devices", lambda _: None)
    of_the_server(model, 2, "cuda", "auto", [])
    server_args._State.command_line = None
    arguments = SimpleNamespace(model_path="none", tp_size=1, device="cuda", **ONE_SERVER)
    server_args.around_resolve(lambda _: None, arguments)
    assert received() is None


@pytest.mark.parametrize("dtype", ["auto", "half", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 64}, {"num_key_value_heads": 4, "torch_dtype": "bfloat16"}]
)
def test_sizes_from_the_configuration_are_those_of_sglang(
    model: Path, dtype: str, changes: dict[str, object]
) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert Model.from_config(model, dtype) == as_the_server(model, dtype)


def test_a_command_line_gives_the_same_configuration(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    name = profile(tmp_path, 0)
    config = from_flags(parser.parse_args(["--fairkv", "--fairkv-profile", name]), {})
    assert config.profile == Path(name).resolve()


def test_a_prefill_server_has_no_plan_of_its_own(model: Path, tmp_path: Path) -> None:
    """Prompts are computed on SGLang's placement; plans are the decode server's."""
    flags = ["--fairkv-profile", profile(tmp_path, 3), "--fairkv-placement", "equal_shares"]
    parser = argparse.ArgumentParser()
    add_flags(parser)
    server_args.before_from_cli_args(object, parser.parse_args(["--fairkv", *flags]))
    config = server_args._State.command_line
    assert config is not None
    prefill = server_args._of_role(config, "prefill")
    assert (prefill.placement, prefill.replan) == ("contiguous", "off")
    assert prefill.scorer == config.scorer and prefill.profile == config.profile
    assert server_args._of_role(config, "decode") == config
