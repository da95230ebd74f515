# SPDX-License-Identifier: Apache-2.0
"""Weights of trained scorers: what is read, what is refused, and where their scores lie."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fairkv_sglang.attention.hidden_scores import HiddenScores
from fairkv_sglang.budgets import make_scorer
from fairkv_sglang.config import ConfigError, FairKVConfig, from_mapping, read_file
from fairkv_sglang.config.request_options import keep_of_text, read_request_options
from fairkv_sglang.memory.sizing import divide_memory
from fairkv_sglang.model import Model, Sliding
from fairkv_sglang.support import check_disaggregated, check_start
from fairkv_tests.learned import random_gates, write_gates, write_kvzap, write_weights

MODEL = Model("random", 3, 6, 2, 8, 24)
CPU = torch.float32, torch.device("cpu")
LEARNED = ("kvzap", "fastkvzip")


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_tensors(file: str, **changes: Any) -> Callable[[Path], object]:
    """Other tensors; None: gone."""

    def edit(folder: Path) -> None:
        tensors = {**load_file(folder / file), **changes}
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / file)

    return edit


def without_files(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


WEIGHTS, GATES = "model.safetensors", "gates.safetensors"
WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no tensors": ("kvzap", without_files, r"it has no \*\.safetensors, which alone are read$"),
    "a pickle": (
        "fastkvzip",
        lambda folder: (folder / GATES).rename(folder / "gates.pt"),
        r"it has no \*\.safetensors",
    ),
    "cut off": (
        "kvzap",
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]),
        r"model\.safetensors cannot be read: ",
    ),
    "no config": (
        "kvzap",
        lambda folder: (folder / "config.json").unlink(),
        r"config\.json cannot be read: No such file or directory$",
    ),
    "broken config": (
        "kvzap",
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json cannot be read: ",
    ),
    "a list": (
        "kvzap",
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json is no JSON object$",
    ),
    "layers": (
        "kvzap",
        edit_config(n_modules=4),
        r"n_modules in config\.json is 4, this model needs 3$",
    ),
    "hidden": ("kvzap", edit_config(input_dim=25), r"input_dim .* is 25, this model needs 24$"),
    "heads": ("kvzap", edit_config(output_dim=6), r"output_dim .* is 6, this model needs 2$"),
    "width": (
        "kvzap",
        edit_config(hidden_dim=11),
        r"the shape of layers\.0\.0\.weight is \[10, 24\], this model needs \[11, 24\]$",
    ),
    "linear": ("kvzap", edit_config(hidden_dim=None), r"it has no tensor layers\.0\.weight$"),
    "a lost tensor": (
        "kvzap",
        edit_tensors(WEIGHTS, **{"layers.2.2.bias": None}),
        r"it has no tensor layers\.2\.2\.bias$",
    ),
    "gates of more layers": (
        "fastkvzip",
        lambda folder: write_gates(folder, random_gates(4, 2, 3, 24)),
        r"the number of layers is 4, this model needs 3$",
    ),
    "gates of more heads": (
        "fastkvzip",
        lambda folder: write_gates(folder, random_gates(3, 3, 2, 24)),
        r"the shape of 0\.k_proj\.weight is \[12, 24\], this model needs \[8, 24\]$",
    ),
    "a last gate of another size": (
        "fastkvzip",
        edit_tensors(GATES, **{"2.k_base": torch.zeros(2, 1, 5, 4)}),
        r"the shape of 2\.k_base is \[2, 1, 5, 4\], this model needs \[2, 1, 3, 4\]$",
    ),
}


@pytest.mark.parametrize(("scorer", "edit", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_checkpoint_is_refused_in_one_line_before_a_model_is_loaded(
    scorer: str, edit: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    folder = write_weights(tmp_path, scorer, MODEL)
    config = FairKVConfig(enabled=True, scorer=scorer, scorer_checkpoint=folder)
    check_start(config, MODEL, 1, "cpu")
    edit(folder)
    expected = rf"^scorer checkpoint {re.escape(str(folder))}: {words}"
    with pytest.raises(ConfigError, match=expected) as caught:
        check_start(config, MODEL, 1, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scorer", LEARNED)
def test_a_checkpoint_must_be_given(scorer: str, tmp_path: Path) -> None:
    for folder, words in (
        (None, rf"^scorer {scorer} has weights .* \(--fairkv-scorer-checkpoint DIR\)$"),
        (tmp_path / "nothing", r"^scorer checkpoint .*nothing: there is no such folder$"),
    ):
        config = FairKVConfig(enabled=True, scorer=scorer, scorer_checkpoint=folder)
        with pytest.raises(ConfigError, match=words):
            check_start(config, MODEL, 1, "cpu")


def test_a_file_of_options_names_a_folder_beside_it(tmp_path: Path) -> None:
    write_weights(tmp_path, "kvzap", MODEL)
    file = tmp_path / "fairkv.yaml"
    file.write_text("enabled: true\nscorer: kvzap\nscorer_checkpoint: kvzap\n")
    config = from_mapping(read_file(file), str(file))
    assert config.scorer_checkpoint == tmp_path / "kvzap"
    check_start(config, MODEL, 1, "cpu")
    assert FairKVConfig.model_validate_json(config.to_json()) == config  # as ranks get it


@pytest.mark.parametrize("scorer", LEARNED)
def test_two_servers_are_refused(scorer: str) -> None:
    with pytest.raises(ConfigError, match=f"--disaggregation-mode with scorer {scorer}"):
        check_disaggregated(FairKVConfig(enabled=True, scorer=scorer), MODEL)


def test_a_request_takes_the_servers_weights_and_names_no_others(tmp_path: Path) -> None:
    """It may have another window, or another scorer, than the server's."""
    server = FairKVConfig(enabled=True, scorer="kvzap", scorer_checkpoint=tmp_path, window=16)

    def asked(**values: Any) -> Any:
        options = read_request_options(values, server=server, prompt_len=500)
        return keep_of_text(options.to_text()).scorer

    own = {"scorer_checkpoint": tmp_path}
    assert asked(scorer="kvzap") == make_scorer("kvzap", **own)
    assert asked(window=40) == make_scorer("kvzap", window=40, **own)
    assert asked(scorer="snapkv") == make_scorer("snapkv")
    assert asked(scorer="fastkvzip") == make_scorer("fastkvzip")  # ranks say no
    for path in (str(tmp_path), None, "/etc"):
        with pytest.raises(ValueError, match=r"^fairkv\.scorer_checkpoint names a file, which is"):
            asked(scorer="kvzap", scorer_checkpoint=path)


@pytest.mark.parametrize("scorer", LEARNED)
def test_scores_are_found_by_slots(scorer: str, tmp_path: Path) -> None:
    """Of the layers with a budget and the home heads, whatever order and passes they come in."""
    model = replace(MODEL, sliding=Sliding(8, (1,)))
    made = make_scorer(scorer, scorer_checkpoint=write_weights(tmp_path, scorer, model))
    every = made.gates(model, [0, 2], [0, 1], *CPU)
    scores = HiddenScores(made.gates(model, [0, 2], [1], *CPU), 50, 1, CPU[1])
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 30, 24, generator=make)
    slots = torch.randperm(50, generator=make)[:30]
    for layer in range(3):
        for part in (slice(0, 11), slice(11, 30)):
            scores.add(layer, hidden[layer, part], slots[part])
    asked = torch.tensor([29, 3, 17])
    for layer in (0, 2):
        wanted = every[layer](hidden[layer])[asked, 1:].T
        torch.testing.assert_close(scores.of(layer, slots[asked]), wanted)
    assert not torch.equal(scores.of(0, slots), scores.of(2, slots))
    with pytest.raises(RuntimeError, match="quantises this model's hidden states"):
        scores.add(0, (hidden[0], None), slots)


@pytest.mark.parametrize("scorer", LEARNED)
def test_a_model_in_sixteen_bits(scorer: str, tmp_path: Path) -> None:
    """Products with hidden states are in its type; what becomes of them has float32's steps."""
    model = replace(MODEL, hidden_size=96)
    made = make_scorer(scorer, scorer_checkpoint=write_weights(tmp_path, scorer, model))
    hidden = torch.randn(400, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    (exact,) = made.gates(model, [1], [0, 1], *CPU).values()
    (found,) = made.gates(model, [1], [0, 1], torch.bfloat16, CPU[1]).values()
    scores = found(hidden)
    assert scores.dtype == torch.float32 and len(scores.unique()) > 780
    wanted = exact(hidden.float())
    assert (scores - wanted).std() < 0.02 * wanted.std()


@pytest.mark.parametrize("inner", [None, 10])
def test_kvzap_may_be_in_pieces_and_in_any_type(inner: int | None, tmp_path: Path) -> None:
    """As large checkpoints are; the index that comes with them is not needed."""
    folder = write_kvzap(tmp_path, 3, 2, 24, inner)
    (scores,) = (
        make_scorer("kvzap", scorer_checkpoint=folder).gates(MODEL, [2], [0, 1], *CPU).values()
    )
    tensors = {key: x.bfloat16().float() for key, x in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    hidden = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    made = make_scorer("kvzap", scorer_checkpoint=folder)
    (rounded,) = made.gates(MODEL, [2], [0, 1], *CPU).values()
    assert not torch.equal(scores(hidden), rounded(hidden))
    names = sorted(tensors)
    (folder / WEIGHTS).unlink()
    for number in range(2):
        part = {key: tensors[key].bfloat16() for key in names[number::2]}
        save_file(part, folder / f"model-0000{number + 1}-of-00002.safetensors")
    (again,) = made.gates(MODEL, [2], [0, 1], *CPU).values()
    assert torch.equal(again(hidden), rounded(hidden))


def test_published_gates_are_converted_by_the_lines_of_the_page(tmp_path: Path) -> None:
    """They come as a pickle that has numpy's numbers beside the tensors."""
    gates = random_gates(3, 2, 3, 24)
    published = {"module": gates, "loss": np.float64(0.25), "log": np.arange(3.0)}
    torch.save(published, tmp_path / "q3_dim16_sink16.pt")
    page = (Path(__file__).parents[2] / "docs" / "budgets.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*weights_only[^`]*)```", page)
    exec(
        code.replace("GATES.pt", str(tmp_path / "q3_dim16_sink16.pt")).replace("DIR", str(tmp_path))
    )
    written = load_file(next(tmp_path.glob("*.safetensors")))
    assert written.keys() == {f"{i}.{name}" for i in range(3) for name in gates[0]}
    assert all(torch.equal(written[f"2.{name}"], x) for name, x in gates[2].items())
    config = FairKVConfig(enabled=True, scorer="fastkvzip", scorer_checkpoint=tmp_path)
    check_start(config, MODEL, 1, "cpu")


def test_scores_beside_the_pool_are_paid_for(tmp_path: Path) -> None:
    folder = write_weights(tmp_path, "kvzap", MODEL)
    config = FairKVConfig(enabled=True, scorer="kvzap", scorer_checkpoint=folder)
    start = check_start(config, MODEL, 1, "cpu")
    assert start.score_bytes(2) == 3 * 2 * 4
    sliding = replace(MODEL, sliding=Sliding(8, (0, 1)))
    assert check_start(config, sliding, 1, "cpu").score_bytes(2) == 2 * 4
    assert check_start(FairKVConfig(enabled=True), MODEL, 1, "cpu").score_bytes(2) == 0
    sizes: dict[str, Any] = {
        "lane_slots": np.full((3, 1), 2), "total_tokens": 5000, "stock_heads": 2, "head_dim": 8,
        "dtype_bytes": 2, "page_size": 1, "context_len": 512, "pass_tokens": 256,
        "max_requests": 4, "prefill_pool": 1000,
    }  # fmt: skip
    without, scored = divide_memory(**sizes), divide_memory(**sizes, score_bytes=24)
    assert scored.pool_tokens == without.pool_tokens == 1000
    assert scored.pool_bytes - without.pool_bytes == 1001 * 24
    for parts in (without, scored):
        used = parts.pool_bytes + parts.table_bytes[0] + parts.arena_pages[0] * parts.page_bytes
        assert 0 <= parts.total_bytes - used < 2 * parts.page_bytes
