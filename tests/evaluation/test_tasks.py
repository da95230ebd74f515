# SPDX-License-Identifier: Apache-2.0
"""Tasks are the same for the same seed, can be answered from their text, and no answer is free."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fairkv_sglang.evaluation.tasks import (
    TASKS,
    Check,
    Sample,
    make_samples,
    read_samples,
    write_samples,
)


def count(text: str) -> int:
    return len(text.split())


def solve(sample: Sample) -> str:
    """The answer by plain search, each task in its own way; no look at the checks."""
    text, question = sample.context, sample.question
    names = re.findall(r"\b[A-Z][a-z]+\b", question)
    number = dict(re.findall(r"magic number of (\w+) is (\d+)", text))
    if sample.task in ("needle", "queries"):
        return f"It is {number[names[-1] if names[-1] in number else names[-2]]}."
    if sample.task == "needles":
        name = next(n for n in names if f"A magic number of {n} is" in text)
        return ", ".join(re.findall(rf"magic number of {name} is (\d+)", text))
    if sample.task == "trace":
        variable = re.search(r"variable (\w+)\?", question)
        assert variable
        at = variable[1]
        while source := re.search(rf"Variable {at} equals variable (\w+)\.", text):
            at = source[1]
        value = re.search(rf"Variable {at} is (\d+)\.", text)
        assert value
        return value[1]
    if sample.task == "copy":
        name = next(n for n in names if f"{n} wrote" in text)
        wrote = re.search(rf'{name} wrote: "([^"]+)"', text)
        assert wrote
        return wrote[1]
    if sample.task == "count":
        name = next(n for n in names if f"{n} rang" in text)
        return str(text.count(f"{name} rang the bell."))
    if sample.task == "instructions":
        rules = re.search(r"Begin with the word (\w+)\. 2\. End with the word (\w+)\.", text)
        name = next(n for n in names if n in number)
        assert rules
        return f"{rules[1]} {number[name]} {rules[2]}".upper()
    assert sample.task == "system"
    word = re.search(r"begin your answer with the word (\w+)\.", sample.system)
    assert word
    asked = next((n for n in names if n in number), None)
    return f"{word[1].capitalize()}: {number[asked] if asked else 'no, I will not tell it'}."


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [200, 700])
def test_same_seed_same_text_and_right_answers_pass(task: str, tokens: int) -> None:
    samples = make_samples(task, 3, tokens, 12, count)
    assert samples == make_samples(task, 3, tokens, 12, count)
    assert samples[:4] == make_samples(task, 3, tokens, 4, count)[:4]
    assert samples[0].context != make_samples(task, 4, tokens, 1, count)[0].context
    assert 12 <= len(samples) <= 15 and len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert tokens - 15 <= count(sample.context) <= tokens
        answer = solve(sample)
        assert sample.score(answer) == 1.0, (sample.question, answer, sample.checks)
        assert count(answer) * 4 < sample.new_tokens * 3
        wrong = ("", "I do not know.", "The magic number is 12.")
        assert all(sample.score(answer) < 1.0 for answer in wrong)


def test_questions_about_one_context_stand_side_by_side() -> None:
    samples = make_samples("queries", 0, 300, 8, count)
    assert [s.context for s in samples[:4]] == [samples[0].context] * 4
    assert len({s.question for s in samples[:4]}) == 4
    assert samples[4].context != samples[0].context


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="8 facts do not fit into 20 tokens"):
        make_samples("queries", 0, 20, 1, count)
    with pytest.raises(ValueError, match="there is no task 'sums': choose from needle"):
        make_samples("sums", 0, 100, 1, count)


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("contains", "12", "It is **12**.", "It is 123."),
        ("contains", "1234567", "1,234,567!", "7654321,234567"),
        ("contains", "the old\triver".replace("\t", " "), "The  old\nriver", "the older river"),
        ("absent", "lamp", "LAMPS", "the lamp."),
        ("begins", "warm", '"Warm", it is', "it is warm"),
        ("begins", "warm", "WARM.", "warmer"),
        ("ends", "blue", "It is Blue.", "blue it is"),
        ("upper", "", "YES, 12!", "YES, it is"),
        ("exact", "40 26 01", " 40 26 01", "40 26 01 82"),
        ("exact", "40  26\n01", "40 26 01", "402601"),
        ("contains", "1,234,567.", "It is 1234567", "It is 1234568."),
        ("contains", "the  old river", "The old\nriver", "the older river"),
        ("ends", "Blue.", "it is blue", "blue it is"),
    ],
)
def test_checks(kind: str, value: str, good: str, bad: str) -> None:
    check = Check(kind, value)  # type: ignore[arg-type]
    assert check.passes(good) and not check.passes(bad)


def test_score_is_the_share_of_checks() -> None:
    checks = (Check("contains", "a"), Check("contains", "b"))
    sample = Sample("0", "t", 0, "", "", checks)
    assert [sample.score(text) for text in ("", "a", "a b")] == [0.0, 0.5, 1.0]


def test_own_samples(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    written = make_samples("system", 0, 100, 4, count)
    write_samples(file, written)
    assert list(read_samples(file)) == written
    file.write_text('{"context": "c", "question": "q", "checks": [["contains", "x"]]}\n')
    assert list(read_samples(file)) == [Sample("1", "own", 0, "c", "q", (Check("contains", "x"),))]


def test_own_samples_as_people_write_them(tmp_path: Path) -> None:
    """A number as the value, a line separator inside of a text, the same id twice."""
    file = tmp_path / "own.jsonl"
    line = '{"context": "a\u2028b", "question": "q", "checks": [["contains", 42]], "id": "1"}\n'
    file.write_text(line, encoding="utf-8")
    (sample,) = read_samples(file)
    assert sample.context == "a\u2028b" and sample.score("It is 42.") == 1.0
    file.write_text(2 * line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: not a sample \(there is another one with id 1"):
        list(read_samples(file))


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"context": "c", "question": "q", "checks": []}',
     '{"context": "c", "question": "q", "checks": [["like", "x"]]}',
     '{"context": "c", "question": "q", "checks": [["contains"]]}',
     '{"context": "c", "question": "q", "checks": [["absent", " ."]]}',
     '{"context": "c", "question": "q", "checks": [["contains", "x"]], "colour": 1}'],
)  # fmt: skip
def test_what_is_no_sample_is_said(tmp_path: Path, line: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"own.jsonl, line 1: not a sample"):
        list(read_samples(file))
