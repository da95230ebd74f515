# SPDX-License-Identifier: Apache-2.0
"""Other projects' tables: small files in each format, and the collected ones where they exist."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fairkv_sglang.profiles import read_profile

COLLECTED = Path(__file__).resolve().parents[3] / "shared" / "profiles"


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n")
    return path


@pytest.fixture
def duo(tmp_path):
    folder = tmp_path / "duo"
    _write(folder / "full_attention_heads.tsv", [[-0.1, 0.9, 1.2], [0.3, 0.0, 0.8]])
    (folder / "config.json").write_text(json.dumps({"model_name": "models/Tiny"}))
    return folder


@pytest.fixture
def tangram(tmp_path):
    data = {
        "meta": {"model_name": "org/Tiny", "scorer": "snapkv", "tensor_parallel_size": None},
        "threshold_scope": "per_layer",
        "sample_fields": ["context_tokens", "sink_tokens", "total_tokens", "protected_window"],
        "samples": [[1000, 4, 1004, 96], [2000, 4, 2004, 96]],
        # Beyond sink and window: 100 and 300, then 600 and 200.
        "kept": [[[200, 400]], [[700, 300]]],
    }
    path = tmp_path / "tangram.json"
    path.write_text(json.dumps(data))
    return path


def test_duo_keeps_the_upper_quantile(duo):
    options = {"context_length": 1000, "sparsity": 0.5, "sink": 10, "recent": 90}
    wanted = np.array([[100, 1000, 1000], [100, 100, 1000]]) / 3300
    for path in (duo, duo / "full_attention_heads.tsv"):
        profile = read_profile(path, **options)
        assert profile.model == "Tiny"
        np.testing.assert_allclose(profile.shares, wanted)
        assert options.items() <= profile.meta.items()
    without = read_profile(duo, **(options | {"sparsity": 1.0}))
    np.testing.assert_allclose(without.relative, 1.0)


def test_duo_ties_and_short_contexts(tmp_path):
    path = _write(tmp_path / "full_attention_heads.tsv", [[1.0, 2.0], [1.5, 0.2]])
    profile = read_profile(path, context_length=1000, sink=50, recent=50)
    # Gates are clipped to 1 first: three are equal, and the first two win.
    np.testing.assert_allclose(profile.shares, np.array([[10, 10], [1, 1]]) / 22)
    np.testing.assert_allclose(read_profile(path, context_length=80).relative, 1.0)
    assert profile.model is None


def test_duo_is_told_by_negative_gates(tmp_path):
    path = _write(tmp_path / "gates.tsv", [[-1e-4, 0.9], [0.3, 0.8]])
    assert read_profile(path).meta["scorer"] == "duo-attention"


def test_kvzip_keeps_whole_heads(tmp_path):
    path = _write(tmp_path / "Tiny" / "head_score_text-0.tsv", [[0.9, 0.1], [0.5, 0.5], [1, 0.2]])
    profile = read_profile(path, context_length=1000, ratio=0.5, sink=4, recent=96)
    wanted = np.array([[1000, 100], [1000, 100], [1000, 100]]) / 3300
    np.testing.assert_allclose(profile.shares, wanted)
    assert profile.model == "Tiny"
    # Upstream's 0.6 of six heads: four.
    assert (read_profile(path).relative > 1).sum() == 4


def test_attention_matching_is_taken_as_it_stands(tmp_path):
    path = _write(tmp_path / "Tiny" / "optimized.tsv", [[0.1, 0.2], [0.3, 0.4]])
    profile = read_profile(path)
    assert profile.model == "Tiny"
    np.testing.assert_allclose(profile.shares, [[0.1, 0.2], [0.3, 0.4]])
    assert "layers" not in profile.meta


def test_attention_matching_of_some_layers(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text("# layers: 5,11\n0.1\t0.2\n0.3\t0.4\n")
    assert read_profile(path).meta["layers"] == [5, 11]
    for text, message in [
        ("# layers: 5\n0.1\t0.2\n0.3\t0.4\n", "lists 1 layers but has 2 rows"),
        ("# layers: a\n0.1\t0.9\n", "cannot read the layer ids"),
        ("# layers: 1\n0.1\t0.7\n", "shares sum to 0.8, expected 1"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_profile(path)


def test_tangram_is_the_mean_of_what_competed(tangram):
    profile = read_profile(tangram)
    # Each sample weighs the same: (1/4 + 3/4) / 2 and (3/4 + 1/4) / 2.
    np.testing.assert_allclose(profile.shares, [[0.5, 0.5]])
    np.testing.assert_allclose(read_profile(tangram, samples=[0]).shares, [[0.25, 0.75]])
    # With a window of 32 in a mean budget of 132: 32 + 50 and 32 + 150.
    again = read_profile(tangram, samples=[0], mean_budget=132, window=32)
    np.testing.assert_allclose(again.shares, [[82 / 264, 182 / 264]])
    assert profile.model == "org/Tiny" and profile.meta["scorer"] == "snapkv"
    assert profile.meta["samples"] == [0, 1]


def test_tangram_that_does_not_fit(tangram):
    for options, message in [
        ({"samples": [2]}, "samples must be between 0 and 1"),
        ({"samples": []}, "samples must be between 0 and 1"),
        ({"mean_budget": 32}, "must exceed the window"),
        ({"sparsity": 0.5}, "has no option sparsity; it has: samples, mean_budget, window"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_profile(tangram, **options)
    good = json.loads(tangram.read_text())
    for change, message in [
        ({"kept": [[[1, 2]], [[1]]]}, "ragged"),
        ({"kept": [[[1, 2]]]}, r"kept has shape \[1, 1, 2\] and samples \[2, 4\]"),
        ({"kept": [[[10, 20]], [[1, 2]]]}, "nothing besides its sink and window"),
        ({"sample_fields": ["a"]}, "sample_fields are"),
    ]:
        tangram.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            read_profile(tangram)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must lie between 0 and 1"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"recent": 0}, "recent must be at least 1"),
    ],
)
def test_bad_option(duo, options, message):
    with pytest.raises(ValueError, match=message):
        read_profile(duo, **options)


def _collected():
    """(file, format, shape) of the profiles beside the repository; none elsewhere."""
    shapes = {
        "Llama-2-7B-32K-Instruct": (32, 32),
        "Qwen2.5-7B-Instruct-1M": (28, 4),
        "gemma-3-4b-it": (5, 4),
        "qwen3-30b-a3b-instruct-2507": (48, 2),
    }
    files = [*COLLECTED.glob("*/*/*.tsv"), *COLLECTED.glob("tangram/*/*.json")]
    return [
        pytest.param(
            path,
            path.parts[-3],
            shapes.get(path.parts[-2], (32, 8)),
            id="/".join(path.relative_to(COLLECTED).parts),
        )
        for path in sorted(files)
    ]


if _collected():  # otherwise pytest would report a skip for an empty parameter set

    @pytest.mark.parametrize(("path", "format", "shape"), _collected())
    def test_collected_profiles(path, format, shape):
        profile = read_profile(path)
        assert profile.shares.shape == shape
        assert profile.shares.sum() == pytest.approx(1.0)
        np.testing.assert_array_equal(read_profile(path, format).shares, profile.shares)
        if "pyramidkv" in path.name:
            assert np.ptp(profile.shares, axis=1).max() == pytest.approx(0.0)
        else:
            assert profile.relative.max() > 1.5
