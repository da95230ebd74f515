# SPDX-License-Identifier: Apache-2.0
"""From flags to the engines' options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fairkv_sglang.bench.settings import Settings
from fairkv_sglang.bench.variants import DEFAULT, VARIANTS
from fairkv_sglang.cli.bench import add_arguments, settings_of
from fairkv_sglang.cli.main import main
from fairkv_sglang.config import from_mapping


def parsed(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_of(parser.parse_args(["--device", "cpu", *words]))


def test_defaults_run_all_variants() -> None:
    settings = parsed()
    assert settings.variants == DEFAULT
    assert settings.cases() == [(2, {"budget": 256})]
    assert settings.measure and settings.dtype == "float32"


def test_every_budget_with_every_tp() -> None:
    settings = parsed("--tp", "1,2", "--budgets", "128,2048")
    assert settings.cases() == [
        (1, {"budget": 128}),
        (1, {"budget": 2048}),
        (2, {"budget": 128}),
        (2, {"budget": 2048}),
    ]
    assert parsed("--ratio", "0.25").cases() == [(2, {"ratio": 0.25})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ratio", "0.5", "--budgets", "64"), "exclude each other"),
        (("--ratio", "1.5"), "--ratio: .*less than or equal to 1.*1.5"),
        (("--prompt-len", "9", "--shared-prefix", "9"), "leaves nothing of a prompt of 9"),
        (("--request-rate", "0"), "--request-rate: .*greater than 0"),
        (("--rounds", "0"), "--rounds: .*greater than or equal to 1"),
        (("--prompts", "0"), "--prompts: .*greater than 0"),
        (("--output-len", "1"), "--output-length"),
        (("--variants", "fair"), "'fair' is not one of stock"),
        (("--server", "{"), "--server is not JSON"),
        (("--server", "[]"), "must be a JSON object"),
        (("--model", "heads=3"), "--model: unknown option 'heads'"),
    ],
)
def test_wrong_flags_say_what_is_wrong(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*words)


def test_a_wrong_flag_is_status_2_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tp", "x", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_variants_have_the_same_memory_and_server_arguments(tmp_path: Path) -> None:
    settings = parsed("--server", '{"page_size": 1}')
    profile = tmp_path / "p.json"
    profile.touch()
    engines = {}
    for name in VARIANTS:
        options = settings.worker_options(name, 2, {"budget": 256}, tmp_path, profile)
        engines[name] = options["engine"]
        if name.startswith("stock"):
            assert options["fairkv"] is None
        else:
            from_mapping({"enabled": True, **options["fairkv"]})  # FairKV takes them
    flags = {"attention_backend", "disable_prefill_cuda_graph"}
    common = [
        {key: value for key, value in engine.items() if key not in flags}
        for engine in engines.values()
    ]
    assert all(engine == common[0] for engine in common)
    assert common[0]["page_size"] == 1
    assert flags <= set(engines["stock-flags"]) and not flags & set(engines["stock"])


def test_variants_differ_in_what_their_names_say(tmp_path: Path) -> None:
    settings, profile = parsed(), tmp_path / "p.json"

    def fairkv(name: str) -> dict[str, object]:
        options = settings.worker_options(name, 2, {"budget": 256}, tmp_path, profile)
        return dict(options["fairkv"])

    for name in ("contiguous", "best_effort", "equal_shares", "fair_copying"):
        assert (fairkv(name)["placement"], fairkv(name)["scope"]) == (name, "head")
        assert fairkv(name)["budget"] == 256
    assert (fairkv("rank_local")["placement"], fairkv("rank_local")["scope"]) == (
        "contiguous",
        "rank",
    )
    assert fairkv("full")["ratio"] == 1.0 and "budget" not in fairkv("full")
    assert "full" not in DEFAULT and not VARIANTS["full"].has_budget


def test_default_memory_holds_the_whole_batch_and_a_given_one_is_taken() -> None:
    settings = parsed("--prompts", "10", "--output-len", "50")
    total = settings.total_tokens({"budget": 256})
    # heads of the fullest rank beside a pool for a prompt and a chunk
    assert total >= 10 * (256 * 1.5 + 50) + 1024 + 50 + 2048
    assert total < 10 * (1024 + 50) * 2
    assert parsed("--max-total-tokens", "5000").total_tokens({"budget": 256}) == 5000
    assert settings.mean_budget({"ratio": 0.5}) == 512
    assert settings.mean_budget({"budget": 4096}) == 1024


def test_engines_do_not_inherit_a_users_configuration() -> None:
    environment = parsed().environment()
    assert environment["FAIRKV_CONFIG"] == environment["FAIRKV_RESOLVED"] == ""
    assert environment["FAIRKV_MEASURE_WAIT"] == "1"
    assert parsed("--measure", "off").environment()["FAIRKV_MEASURE_WAIT"] == "0"
