# SPDX-License-Identifier: Apache-2.0
"""Prompts, and the parsing of lists in flags."""

from __future__ import annotations

import pytest

from fairkv_sglang.bench.workload import FIRST_ID, Workload, parse_ints, parse_names, portable


def test_prompts_repeat_for_a_seed_and_differ_between_rounds() -> None:
    work = Workload(prompts=5, prompt_lengths=(7, 20), output_length=3, seed=4)
    first = work.make(100)
    assert first == work.make(100)
    assert [len(prompt) for prompt in first] == [7, 20, 7, 20, 7] == work.lengths()
    assert all(FIRST_ID <= token < 100 for prompt in first for token in prompt)
    second = work.make(100, 1)
    assert not {tuple(prompt) for prompt in first} & {tuple(prompt) for prompt in second}
    assert first != work.model_copy(update={"seed": 5}).make(100)
    assert (work.longest, work.mean_prompt) == (23, pytest.approx(61 / 5))


def test_a_vocabulary_of_special_tokens_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 4"):
        Workload(prompts=1, prompt_lengths=(1,), output_length=2).make(4)


def test_lists_of_numbers() -> None:
    assert parse_ints("128, 256", "--budgets") == (128, 256)
    for text in ("", "a", "1,,2", "0", "-4"):
        with pytest.raises(ValueError, match="--budgets"):
            parse_ints(text, "--budgets")


def test_lists_of_names() -> None:
    known = ("a", "b", "c")
    assert parse_names("all", known, "--x") == known
    assert parse_names("c,a,c", known, "--x") == ("c", "a")
    with pytest.raises(ValueError, match="'d' is not one of a, b, c"):
        parse_names("a,d", known, "--x")


def test_result_files_do_not_tell_where_things_lie() -> None:
    found = portable({"profile": "/home/me/data/a/b.json", "model_path": None, "rounds": 3})
    assert found == {"profile": "data/a/b.json", "model_path": None, "rounds": 3}


def test_arrivals_are_poisson_and_the_same_for_every_variant() -> None:
    at_once = Workload(prompts=3, prompt_lengths=(5,), output_length=2)
    assert at_once.arrivals() == [0.0, 0.0, 0.0]
    work = Workload(prompts=2000, prompt_lengths=(5,), output_length=2, request_rate=4.0)
    times = work.arrivals(1)
    assert times == work.arrivals(1) != work.arrivals(2)
    assert times[0] == 0.0 and times == sorted(times)
    assert times[-1] == pytest.approx(2000 / 4, rel=0.1)


def test_shared_prefix() -> None:
    work = Workload(prompts=3, prompt_lengths=(9, 12), output_length=2, shared_prefix=8)
    first, second = work.make(1000), work.make(1000, 1)
    assert [len(prompt) for prompt in first] == [9, 12, 9]
    assert len({tuple(prompt[:8]) for prompt in first}) == 1
    assert first[0][:8] != second[0][:8]
    with pytest.raises(ValueError, match="leaves nothing of a prompt of 9"):
        Workload(prompts=1, prompt_lengths=(9,), output_length=2, shared_prefix=9)
