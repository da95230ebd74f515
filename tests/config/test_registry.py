# SPDX-License-Identifier: Apache-2.0
"""Registries: what may register, what other packages may do wrong, and what users see of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fairkv_sglang.decode_backends import DECODE_BACKENDS, choose
from fairkv_sglang.registry import Registry, option


def _registry(group: str = "no.such.group") -> Registry[Any]:
    return Registry("method", group, known={"budget": (None, "FairKV itself")})


def _method(name: str, kind: type = int, key: str = "size") -> type[Any]:
    namespace = {
        "__annotations__": {key: kind, "name": ClassVar[str], "summary": ClassVar[str]},
        key: option(kind(1), "How big.", gt=0),
        "name": name,
        "summary": "does things",
    }
    return dataclass(frozen=True)(type(name.title(), (), namespace))


def test_fields_are_options_with_type_default_bounds_and_help() -> None:
    registry = _registry()
    registry.register(_method("a"))
    field = registry.options("a")["size"]
    assert (field.annotation, field.default, field.description) == (int, 1, "How big.")
    assert registry.make("a").size == 1
    assert registry.make("a", size="3").size == 3  # as a flag gives it
    assert registry.having("size") == list(registry) == ["a"]
    for options, message in [
        ({"size": 0}, "method 'a': size: 0 must be greater than 0"),
        ({"size": True}, "method 'a': size: a switch value"),
        ({"sise": 2}, "method 'a' has no option sise; it has: size"),
    ]:
        with pytest.raises(ValueError, match=message):
            registry.make("a", **options)
    with pytest.raises(ValueError, match="unknown method 'b'; known: a"):
        registry["b"]
    assert "b" not in registry


def test_a_name_means_one_thing() -> None:
    registry = _registry()
    registry.register(_method("a"))
    registry.register(_method("b"))  # the same option, the same type
    with pytest.raises(ValueError, match=r"'size' is of another type in method 'a'"):
        registry.register(_method("c", float))
    with pytest.raises(ValueError, match="two methods are called 'a'"):
        registry.register(_method("a"))
    with pytest.raises(ValueError, match="'budget' is of another type in FairKV itself"):
        registry.register(_method("d", key="budget"))
    with pytest.raises(ValueError, match="must be a dataclass with a name and a summary"):
        registry.register(object)
    assert list(registry) == ["a", "b"]


@pytest.fixture
def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, str], str], None]:
    """Installs a package with these entry points and this module, for this process."""

    def install(entries: dict[str, str], code: str) -> None:
        info = tmp_path / "methods_of_others-1.0.dist-info"
        info.mkdir()
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: methods-of-others\n")
        (info / "entry_points.txt").write_text("\n".join(["[test.methods]", *lines]))
        (tmp_path / "methods_of_others.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "methods_of_others", raising=False)

    return install


CODE = """
from dataclasses import dataclass
from fairkv_sglang.decode_backends import DECODE_BACKENDS, choose
from fairkv_sglang.registry import option

@dataclass(frozen=True)
class Good:
    name = "good"
    summary = "works"
    level: int = option(3, "How much.")

@dataclass(frozen=True)
class Other:
    name = "other"
    summary = "has the option of a method of ours"
    size: str = option("x", "How big.")
"""


def test_methods_of_other_packages(package: Callable[[dict[str, str], str], None]) -> None:
    """Loaded when first asked; a broken one is one line and leaves the rest alone."""
    names = {"good": "Good", "other": "Other", "alias": "Good", "gone": "Gone"}
    package({name: f"methods_of_others:{cls}" for name, cls in names.items()}, CODE)
    registry = _registry("test.methods")
    registry.register(_method("a"))
    assert "methods_of_others" not in sys.modules
    assert list(registry) == ["a", "good"]
    assert registry.make("good", level=4).level == 4
    for name, reason in [
        ("other", "its option 'size' is of another type in method 'a'"),
        ("alias", "its name is not 'alias' but 'good'"),
        ("gone", "AttributeError"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            registry[name]
        message = str(caught.value)
        assert message.startswith(f"method '{name}' of methods-of-others cannot be used")
        assert "\n" not in message
    assert sorted(registry.broken()) == ["alias", "gone", "other"]


def test_a_package_that_raises_is_one_line(
    package: Callable[[dict[str, str], str], None],
) -> None:
    package({"good": "methods_of_others:Good"}, "raise RuntimeError('no\\nlicence')")
    registry = _registry("test.methods")
    assert list(registry) == []
    with pytest.raises(ValueError, match="RuntimeError: no licence"):
        registry["good"]


@pytest.mark.parametrize(
    ("name", "device", "chosen"),
    [
        ("auto", "cpu", "numba"),
        ("auto", "cuda:1", "flashinfer"),
        ("torch", "cpu", "torch"),
        ("triton", "cuda", "triton"),
    ],
)
def test_decode_backend_of_a_device(name: str, device: str, chosen: str) -> None:
    assert choose(name, device) == chosen


@pytest.mark.parametrize(
    ("name", "device", "others"),
    [("flashinfer", "cpu", "numba, torch"), ("numba", "cuda:0", "flashinfer, triton, torch")],
)
def test_decode_backend_of_another_device_is_one_line(name: str, device: str, others: str) -> None:
    assert name in DECODE_BACKENDS
    wanted = f"--fairkv-decode-backend {name} does not run on {device}: use auto or one of {others}"
    with pytest.raises(ValueError) as caught:
        choose(name, device)
    assert str(caught.value) == wanted
