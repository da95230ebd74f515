# SPDX-License-Identifier: Apache-2.0
"""The profile's own file format: round trip, and one clear line for everything else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save_file

from fairkv_sglang.profiles import HeadProfile, read_profile, uniform_profile
from fairkv_sglang.profiles.profile_picture import draw


def _valid():
    return {
        "format": "fairkv-profile",
        "version": 1,
        "model": "tiny",
        "num_layers": 2,
        "num_kv_heads": 2,
        "share": [[0.5, 1.5], [0.0, 2.0]],
    }


@settings(max_examples=40, deadline=None)
@given(
    table=arrays(
        np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, 1e12)
    ).filter(lambda table: table.any()),
    model=st.none() | st.text(max_size=8),
    suffix=st.sampled_from([".json", ".safetensors"]),
)
def test_round_trip(table, model, suffix, tmp_path_factory):
    profile = HeadProfile(model or None, table, {"source": "test", "samples": [1, 2]})
    path = tmp_path_factory.mktemp("profile") / f"profile{suffix}"
    profile.save(path)
    for again in (HeadProfile.load(path), read_profile(path)):
        assert (again.model, again.meta) == (profile.model, profile.meta)
        np.testing.assert_allclose(again.shares, profile.shares, rtol=1e-12, atol=1e-300)
        assert again.shares.sum() == pytest.approx(1.0)
        assert again.relative.mean() == pytest.approx(1.0)


def test_file_holds_the_documented_keys(tmp_path):
    path = tmp_path / "p.json"
    HeadProfile("tiny", np.array([[1.0, 3.0], [0.0, 4.0]])).save(path)
    data = json.loads(path.read_text())
    meta = data.pop("meta")
    assert meta == {}
    assert data == _valid()


def test_file_without_meta_is_read(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(_valid()))
    profile = read_profile(path)
    assert profile.shares.tolist() == [[0.125, 0.375], [0.0, 0.5]]
    assert (profile.num_layers, profile.num_kv_heads, profile.model) == (2, 2, "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": [[float("nan"), 1], [1, 1]]}, "layer 0, head 0 is not a finite number"),
        ({"share": [[1, float("inf")], [1, 1]]}, "layer 0, head 1 is not a finite number"),
        ({"share": [[2, 1], [2, -1]]}, "layer 1, head 1 is negative"),
        ({"share": [[0, 0], [0, 0]]}, "all shares are zero"),
        ({"share": [[1, 1, 1], [1, 1, 1]]}, "share has 2 layers x 3 heads, but the file says 2"),
        ({"share": [[1, 1], [1]]}, "ragged"),
        ({"share": [[1, 1], [1, "x"]]}, "something else than numbers"),
        ({"share": [1, 1]}, "expected a table of layers x heads"),
        ({"share": []}, "expected a table of layers x heads"),
        ({"share": None}, "something else than numbers|expected a table"),
        ({"share": [[0.25, 0.25], [0.25, 0.25]]}, "mean 0.25, expected mean 1.0"),
        ({"num_layers": 3}, "but the file says 3 x 2"),
        ({"version": 2}, "version 2 is not known, expected 1"),
        ({"meta": []}, '"meta" an object'),
        ({"model": 3}, '"model" must be a string'),
    ],
)
def test_bad_json_file_is_one_line_naming_it(tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(_valid() | change))
    _assert_one_line(path, message)


@pytest.mark.parametrize("key", ["num_layers", "num_kv_heads", "share"])
def test_missing_key(tmp_path, key):
    data = _valid()
    del data[key]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    _assert_one_line(path, f"{key} missing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"format": "fairkv-profile", "version"', "truncated or corrupt"),
        ("a.json", b"\xff\xfe\x00", "truncated or corrupt"),
        ("a.json", b"", "truncated or corrupt"),
        ("a.json", b"[1]", "expected a JSON object"),
        ("a.json", b"{}", "JSON of an unknown kind"),
        ("a.safetensors", b"\x08\x00", "truncated or corrupt"),
        ("a.tsv", b"", "empty"),
        ("a.tsv", b"1\tx\n", "not a table of tab-separated numbers"),
        ("a.tsv", b"1\t2\n3\n", "not a table of tab-separated numbers"),
        ("a.tsv", b"0.5\tnan\n", "number of layer 0, head 1 is nan"),
        ("a.tsv", b"\x80\x81", "not a table of tab-separated numbers"),
        ("a.tsv", b"0.5\t0.9\n", "cannot tell the format; name it as one of: fairkv, duo"),
    ],
)
def test_corrupt_file_is_one_line_naming_it(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    _assert_one_line(path, message)


def test_bad_safetensors(tmp_path):
    path = tmp_path / "bad.safetensors"
    text = {"format": "fairkv-profile", "version": "1", "num_layers": "1", "num_kv_heads": "2"}
    save_file({"other": np.ones((1, 2))}, path, metadata=text)
    _assert_one_line(path, "share missing")
    save_file({"share": np.array([[1.0, -1.0]])}, path, metadata=text)
    _assert_one_line(path, "negative")
    save_file({"share": np.ones((1, 2))}, path)
    _assert_one_line(path, '"format" is None, expected "fairkv-profile"')
    save_file({"share": np.ones((1, 2))}, path, metadata=text | {"meta": "{"})
    _assert_one_line(path, "metadata field 'meta' is not valid JSON")


def test_missing_file_and_unknown_suffix(tmp_path):
    _assert_one_line(tmp_path / "none.json", "no such file")
    _assert_one_line(tmp_path, "a folder without full_attention_heads.tsv")
    with pytest.raises(ValueError, match=r"name it \.json or \.safetensors"):
        uniform_profile(1, 1).save(tmp_path / "p.yaml")


def test_unknown_format_and_option(tmp_path):
    path = tmp_path / "p.json"
    uniform_profile(2, 2).save(path)
    with pytest.raises(ValueError, match="unknown format 'npz'; known: auto, fairkv"):
        read_profile(path, "npz")
    with pytest.raises(ValueError, match="format fairkv has no option sparsity; it has: none"):
        read_profile(path, sparsity=0.5)


def test_profile_of_another_model_is_refused():
    profile = uniform_profile(2, 4)
    profile.require_shape(2, 4)
    with pytest.raises(ValueError, match="2 layers x 4 KV heads, but the model has 32 x 8"):
        profile.require_shape(32, 8)


def test_shares_are_read_only_and_apart_from_the_input():
    table = np.ones((2, 2))
    profile = HeadProfile(None, table)
    table[0, 0] = 100
    assert profile.shares.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    with pytest.raises(ValueError, match="read-only"):
        profile.shares[0, 0] = 1


def test_draw_writes_a_picture(tmp_path):
    path = tmp_path / "p.png"
    draw(HeadProfile("tiny", np.arange(1.0, 13.0).reshape(4, 3)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def _assert_one_line(path, message):
    with pytest.raises(ValueError, match=message) as error:
        read_profile(path)
    text = str(error.value)
    assert text.startswith(f"profile {path}: ") and "\n" not in text
    assert text.count(str(path)) == 1
