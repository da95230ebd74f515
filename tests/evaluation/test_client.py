# SPDX-License-Identifier: Apache-2.0
"""The client on a fake server: what it sends, how it reads answers, runs, the command."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from fairkv_sglang.cli import eval as command
from fairkv_sglang.cli.main import main
from fairkv_sglang.evaluation.client import Client, Prompts
from fairkv_sglang.evaluation.run import read, run
from fairkv_sglang.evaluation.summary import summarise, table
from fairkv_sglang.evaluation.tasks import Sample, make_samples
from fairkv_tests.fake_openai import END, CharacterTokenizer, FakeOpenAI, fake_openai

PROMPTS = Prompts(CharacterTokenizer())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(command, "_tokenizer", lambda name: CharacterTokenizer())
    with fake_openai() as running:
        yield running


def samples(count: int = 8) -> list[Sample]:
    return make_samples("queries", 0, 600, count, PROMPTS.count)


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_prompt_is_cut_behind_the_context() -> None:
    sample = make_samples("system", 0, 300, 1, PROMPTS.count)[0]
    before, after = map(text, PROMPTS.split(sample))
    assert before == f"[system]{sample.system}{END}[user]{sample.context}"
    assert after == f"\n\n{sample.question}{END}[assistant]"
    plain = Prompts(CharacterTokenizer(chat=False))
    before, after = map(text, plain.split(sample))
    assert before == f"{sample.system}\n\n{sample.context}"
    assert after == f"\n\nQuestion: {sample.question}\nAnswer:"
    own = Sample("0", "t", 0, "notes : x .", " question :", sample.checks, verbatim=True)
    assert tuple(map(text, PROMPTS.split(own))) == (own.context, own.question)


def test_aware_sends_one_prompt(server: FakeOpenAI) -> None:
    sample = samples()[0]
    answer = Client(server.url, "fake", PROMPTS).ask(sample, "aware")
    assert sample.score(answer.text) == 1.0 and END not in answer.text
    assert answer.tokens[-1] == END and len(answer.tokens) == len(answer.top or ())
    (body,) = server.requests
    assert text(body["prompt"]) == "".join(map(text, PROMPTS.split(sample)))
    assert body["temperature"] == 0 and body["max_tokens"] == sample.new_tokens
    assert not {"ignore_eos", "custom_params", "custom_logit_processor"} & body.keys()
    assert answer.prompt_tokens == len(body["prompt"])


def test_agnostic_asks_after_the_context(server: FakeOpenAI) -> None:
    sample = samples()[0]
    answer = Client(server.url, "fake", PROMPTS, force=True).ask(sample, "agnostic")
    (body,) = server.requests
    context, question = PROMPTS.split(sample)
    assert body["prompt"] == context and body["custom_params"]["fairkv_forced_ids"] == question
    assert body["ignore_eos"] and body["max_tokens"] == sample.new_tokens + len(question)
    aware = Client(server.url, "fake", PROMPTS).ask(sample, "aware")
    assert answer == aware  # text, tokens and probabilities of the answer alone


def test_a_full_cache_needs_nothing_forced(server: FakeOpenAI) -> None:
    Client(server.url, "fake", PROMPTS).ask(samples()[0], "agnostic")
    assert "custom_params" not in server.requests[0]


def test_the_processor_is_named_as_it_is(server: FakeOpenAI) -> None:
    Client(server.url, "fake", PROMPTS, force=True).ask(samples()[0], "agnostic")
    pytest.importorskip("sglang")
    from fairkv_sglang.patches.forced_tokens import FORCED, ForcedTokens

    body = server.requests[0]
    found = pickle.loads(bytes.fromhex(json.loads(body["custom_logit_processor"])["callable"]))
    assert found is ForcedTokens and set(body["custom_params"]) == {FORCED}


def test_a_question_that_was_not_asked_is_an_error(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"choices": [{"text": " I like it."}]}
    monkeypatch.setattr(server, "complete", lambda _: body)
    with pytest.raises(ValueError, match="did not ask the question after its context"):
        Client(server.url, "fake", PROMPTS, force=True).ask(samples()[0], "agnostic")


def test_without_log_probabilities_tokens_are_the_tokenizers(server: FakeOpenAI) -> None:
    server.logprobs = False
    answer = Client(server.url, "fake", PROMPTS).ask(samples()[0], "aware")
    assert answer.top is None and "".join(answer.tokens).strip() == answer.text


def test_a_run_goes_on_where_it_ended(server: FakeOpenAI, tmp_path: Path) -> None:
    file, client = tmp_path / "run.jsonl", Client(server.url, "fake", PROMPTS)
    seen: list[int] = []

    def go() -> int:
        seen.clear()
        return len(run(client, samples(), ["aware"], file, {"seed": 0}, 2, lambda: seen.append(1)))

    server.fail_after = 5
    with pytest.raises(ValueError, match="answers 500: out of"):
        go()
    kept = len(read(file)[1])
    assert 0 < kept < 8
    with file.open("a") as out:
        out.write('{"id": "half a li')
    server.fail_after = None
    asked = len(server.requests)
    assert go() == 8 and len(seen) == 8
    assert len(server.requests) == asked + 8 - kept
    assert len({record.key for record in read(file)[1]}) == 8
    assert go() == 8 and len(server.requests) == asked + 8 - kept  # nothing is left
    with pytest.raises(ValueError, match="made with seed 0, not 1: give another file"):
        run(client, samples(), ["aware"], file, {"seed": 1}, 2, lambda: None)


def test_summary_of_a_run_that_lost_samples(server: FakeOpenAI, tmp_path: Path) -> None:
    client = Client(server.url, "fake", PROMPTS)

    def go(name: str) -> list:
        return run(client, samples(), ["aware"], tmp_path / name, {}, 1, lambda: None)

    full = go("full.jsonl")
    asked = samples()[2].question.split(" of ")[1].split("?")[0]
    server.forgets = {asked}
    lost = sum(f"of {asked}?" in sample.question for sample in samples())
    (cell,) = summarise(go("lossy.jsonl"), full)
    assert (cell["count"], cell["right"], cell["lost"], cell["won"]) == (8, 8 - lost, lost, 0)
    assert cell["identical"] == 1 - lost / 8 and 0 < cell["agreement"] < 1
    assert cell["kl"] > 0 and summarise(full, full)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert len(table([cell])[0]) == len(table([cell])[1][0]) == 12
    with pytest.raises(ValueError, match="none of this run's samples"):
        summarise(full, [])


def test_command(server: FakeOpenAI, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, fair, picture = (tmp_path / n for n in ("full.jsonl", "fair.jsonl", "eval.png"))
    words = ["eval", "--url", server.url, "--tasks", "needle,queries", "--lengths", "600"]
    words += ["--samples", "4"]
    assert main([*words, "--out", str(full)]) == 0
    said = capsys.readouterr().out
    assert "full cache" in said and "100% [51%..100%]" in said and "lost" not in said
    server.fairkv = True
    server.forgets = {samples()[0].question.split(" of ")[1].split("?")[0]}
    rest = ["--out", str(fair), "--baseline", str(full), "--json", "--plot", str(picture)]
    assert main([*words, *rest, "--options", '{"ratio": 0.5}']) == 0
    result = json.loads(capsys.readouterr().out)
    said = "FairKV snapkv, layer, 25% of the prompt, ratio 0.5 in requests"
    assert result["server"] == said
    cells = {(cell["mode"], cell["task"]): cell for cell in result["cells"]}
    assert len(cells) == 6 and cells["agnostic", "all"]["count"] == 8
    assert cells["agnostic", "queries"]["lost"] == cells["aware", "queries"]["lost"] >= 1
    assert picture.stat().st_size > 1000
    params = [body["custom_params"] for body in server.requests if "custom_params" in body]
    assert len(params) == 16 and all(p["fairkv"] == {"ratio": 0.5} for p in params)
    assert sum("fairkv_forced_ids" in p for p in params) == 8


def test_a_file_holds_one_servers_answers_to_one_seeds_questions(
    server: FakeOpenAI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fairkv = True
    words = ["eval", "--url", server.url, "--tasks", "needle", "--lengths", "600"]
    words += ["--samples", "2", "--out"]
    assert main([*words, str(tmp_path / "a.jsonl")]) == 0
    asked, server.window = len(server.requests), 16
    assert main([*words, str(tmp_path / "a.jsonl")]) == 2
    assert "was made with options {'window': 32}, not {'window': 16}" in capsys.readouterr().err
    of_seed = ["--seed", "1", "--baseline", str(tmp_path / "a.jsonl")]
    assert main([*words, str(tmp_path / "b.jsonl"), *of_seed]) == 2
    assert "has answers to other questions" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main([*words, str(tmp_path / "c.jsonl"), "--own", str(tmp_path / "empty.jsonl")]) == 2
    assert "there are no samples in" in capsys.readouterr().err
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "sums"], "there is no task 'sums'"),
        (["--modes", "both"], "there is no mode 'both'"),
        (["--lengths", "1k"], "--lengths 1k: give numbers of tokens"),
        (["--options", "ratio=0.5"], "--options ratio=0.5: give JSON"),
        (["--options", '{"ratio": 0.5}'], "--options are for a server with FairKV"),
        (["--samples", "0"], "must be at least 1"),
        (["--own", "none.jsonl"], "there is no file none.jsonl"),
        (["--out", "answers.txt"], "name it .jsonl"),
        (["--baseline", __file__], "is not a file of fairkv eval"),
    ],
)
def test_wrong_words_are_one_line(
    server: FakeOpenAI,
    tmp_path: Path,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path / "a.jsonl")]
    assert main(["eval", "--url", server.url, *out, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not server.requests


def test_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--url", "127.0.0.1:9", "--out", str(tmp_path / "a.jsonl")]
    assert main(words) == 2
    assert "no answer from http://127.0.0.1:9" in capsys.readouterr().err
