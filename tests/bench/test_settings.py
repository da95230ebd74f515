# SPDX-License-Identifier: Apache-2.0
"""From flags to a run: models, prompts, and the engines' options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fairkv_sglang.bench.engine.command import add_arguments
from fairkv_sglang.bench.engine.settings import EVERY, FIRST_ID, VARIANTS, EngineSettings
from fairkv_sglang.bench.flags import proportions
from fairkv_sglang.bench.virtual.settings import VirtualSettings
from fairkv_sglang.cli.main import main
from fairkv_sglang.config import from_mapping


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def parsed(*words: str) -> EngineSettings:
    return EngineSettings.of(flags(*words))


def test_every_flag_has_a_text_and_both_kinds_take_their_own_defaults() -> None:
    for kind in (EngineSettings, VirtualSettings):
        assert all(field.description for field in kind.model_fields.values())
    assert parsed().cases() == [(2, {"budget": 256})]
    virtual = VirtualSettings.of(flags("--virtual", "--tp", "2,8"))
    assert virtual.cases() == [(2, 64, 1024), (8, 64, 1024)]
    assert virtual.model.name == "llama-3.1-8b"


def test_the_default_model_has_real_proportions() -> None:
    model = parsed().model
    assert (model.num_layers, model.num_kv_heads, model.group_size) == (28, 8, 2)
    assert (model.hidden_size, model.intermediate_size, model.head_dim) == (1024, 3072, 128)
    said = proportions(model)
    assert "qwen3-0.6b: 28 layers, 8 KV heads of 128, group 2" in said
    assert "vocabulary 8,192 (of 151,936)" in said
    changed = parsed("--model", "attention-only,group=1, kv_heads=4,hidden=32").model
    assert (changed.num_q_heads, changed.num_kv_heads, changed.hidden_size) == (4, 4, 32)
    assert "attention-only,group=1" in proportions(changed) and changed.num_layers == 4


def test_all_variants_by_one_name() -> None:
    assert parsed("--variants", "all").variants == EVERY
    assert {"stock", "contiguous", "best_effort", "equal_shares", "fair_copying", "rank_local"} == {
        *EVERY
    }
    assert parsed("--variants", "full,stock,full").variants == ("full", "stock")
    assert "one uniform budget" in VARIANTS["rank_local"].text  # what it gives up is said


def test_every_budget_with_every_tp() -> None:
    settings = parsed("--tp", "1,2", "--budgets", "128,2048")
    assert settings.cases() == [
        (1, {"budget": 128}), (1, {"budget": 2048}), (2, {"budget": 128}), (2, {"budget": 2048})
    ]  # fmt: skip
    assert parsed("--ratio", "0.25").cases() == [(2, {"ratio": 0.25})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ratio", "0.5", "--budgets", "64"), "exclude each other"),
        (("--ratio", "1.5"), "--ratio: .*less than or equal to 1.*1.5"),
        (("--prompt-len", "9", "--shared-prefix", "9"), "leaves nothing of a prompt of 9"),
        (("--rounds", "0"), "--rounds: .*greater than or equal to 1"),
        (("--output-len", "1"), "--output-len: .*greater than 1"),
        (("--tp", "x"), "--tp: .*integer"),
        (("--budgets", "128,,256"), "--budgets: .*integer"),
        (("--variants", "fair"), "--variants: 'fair' is not one of stock"),
        (("--server", "{"), "--server: .*JSON"),
        (("--model", "gpt"), "--model: 'gpt' is not one of qwen3-0.6b, attention-only"),
        (("--model", "attention-only,heads=3"), "--model: heads=3: give layers"),
        (("--model", "attention-only,group=x"), "--model: group=x"),
        (("--device", "tpu"), "--device: .*'cpu' or 'cuda'"),
    ],
)
def test_wrong_flags_say_what_is_wrong(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*words)


def test_a_wrong_flag_is_status_2_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tp", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_variants_have_the_same_memory_and_server_arguments(tmp_path: Path) -> None:
    settings = parsed("--server", '{"page_size": 1}', "--fairkv", '{"window": 8}')
    profile = tmp_path / "p.json"
    profile.touch()
    engines = []
    for name in VARIANTS:
        options = settings.worker_options(name, 2, {"budget": 256}, tmp_path, profile)
        engines.append(options["engine"])
        if name == "stock":
            assert options["fairkv"] is None
        else:
            assert options["fairkv"]["window"] == 8
            from_mapping({"enabled": True, **options["fairkv"]})  # FairKV takes them
    assert all(engine == engines[0] for engine in engines)
    assert engines[0]["page_size"] == 1


def test_variants_differ_in_what_their_names_say(tmp_path: Path) -> None:
    settings, profile = parsed(), tmp_path / "p.json"

    def fairkv(name: str) -> dict[str, object]:
        options = settings.worker_options(name, 2, {"budget": 256}, tmp_path, profile)
        return dict(options["fairkv"])

    for name in ("contiguous", "best_effort", "equal_shares", "fair_copying"):
        assert (fairkv(name)["placement"], fairkv(name)["scope"]) == (name, "head")
        assert (fairkv(name)["budget"], fairkv(name)["profile"]) == (256, str(profile))
    local = fairkv("rank_local")
    assert (local["placement"], local["scope"]) == ("contiguous", "rank") and "profile" not in local
    assert fairkv("full")["ratio"] == 1.0 and "budget" not in fairkv("full")
    assert not VARIANTS["full"].has_budget


def test_default_memory_holds_the_whole_batch_and_a_given_one_is_taken() -> None:
    settings = parsed("--prompts", "10", "--output-len", "50")
    total = settings.total_tokens({"budget": 256})
    # heads of the fullest rank beside a pool for a prompt and a chunk
    assert total >= 10 * (256 * 1.5 + 50) + 1024 + 50 + 2048
    assert total < 10 * (1024 + 50) * 2
    assert settings.total_tokens({"ratio": 0.25}) == total
    assert parsed("--max-total-tokens", "5000").total_tokens({"budget": 256}) == 5000


def test_prompts_repeat_and_differ_between_rounds() -> None:
    work = parsed("--prompts", "5", "--prompt-len", "7,20")
    first, second = work.make_prompts(100, 0), work.make_prompts(100, 1)
    assert first == work.make_prompts(100, 0)
    assert [len(prompt) for prompt in first] == [7, 20, 7, 20, 7] == work.lengths()
    assert all(FIRST_ID <= token < 100 for prompt in first for token in prompt)
    assert not {tuple(prompt) for prompt in first} & {tuple(prompt) for prompt in second}
    shared = parsed("--prompts", "3", "--prompt-len", "9,12", "--shared-prefix", "8")
    first, second = shared.make_prompts(1000, 0), shared.make_prompts(1000, 1)
    assert len({tuple(prompt[:8]) for prompt in first}) == 1
    assert first[0][:8] != second[0][:8]


def test_result_files_do_not_tell_where_things_lie() -> None:
    found = parsed("--profile", "/home/me/data/a/b.json").portable()
    assert (found["profile"], found["model_path"]) == ("data/a/b.json", None)
    assert EngineSettings(**found).model == parsed().model
