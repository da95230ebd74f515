# SPDX-License-Identifier: Apache-2.0
"""Implementations of decode attention by name, the devices that they run on, what makes them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from fairkv_sglang.registry import Registry

_DECODERS = "fairkv_sglang.attention.decoders"  # torch and kernels come with it


@dataclass(frozen=True)
class DecodeBackend:
    """An implementation of decode attention.

    Attributes:
        name: Key in ``DECODE_BACKENDS`` and value of ``--fairkv-decode-backend``.
        summary: What it is, in a few words, for ``--help``.
        devices: Kinds of device that it runs on, ``cpu`` or ``cuda``; none: it is a choice of
            another one.
        order: Of those that run on a device, the lowest is its default.
        factory: ``module:function`` that makes it, imported when chosen. It gets the rank's
            ``HeadPages`` and ``RankHeads`` and returns a ``Decoder`` (``attention/decoders.py``).
        sinks: Whether it serves models with attention sinks (gpt-oss).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = 0
    factory: ClassVar[str] = ""
    sinks: ClassVar[bool] = False


DECODE_BACKENDS: Registry[DecodeBackend] = Registry(
    "decode backend", "fairkv_sglang.decode_backends"
)


@DECODE_BACKENDS.register
@dataclass(frozen=True)
class Auto(DecodeBackend):
    """The device's default."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "the first of the others that runs on the device"


@DECODE_BACKENDS.register
@dataclass(frozen=True)
class FlashInfer(DecodeBackend):
    """FlashInfer's paged tensor-core kernel."""

    name: ClassVar[str] = "flashinfer"
    summary: ClassVar[str] = "FlashInfer's kernel, CUDA"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    factory: ClassVar[str] = f"{_DECODERS}:flashinfer"


@DECODE_BACKENDS.register
@dataclass(frozen=True)
class Numba(DecodeBackend):
    """Compiled for the CPU."""

    name: ClassVar[str] = "numba"
    summary: ClassVar[str] = "compiled code, CPU"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    factory: ClassVar[str] = f"{_DECODERS}:own_kernel"
    sinks: ClassVar[bool] = True


@DECODE_BACKENDS.register
@dataclass(frozen=True)
class Triton(DecodeBackend):
    """Triton's kernel."""

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "Triton's kernel, CUDA"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    order: ClassVar[int] = 1
    factory: ClassVar[str] = f"{_DECODERS}:own_kernel"
    sinks: ClassVar[bool] = True


@DECODE_BACKENDS.register
@dataclass(frozen=True)
class Torch(DecodeBackend):
    """Plain torch, to compare with."""

    name: ClassVar[str] = "torch"
    summary: ClassVar[str] = "plain torch, slow, any device"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    order: ClassVar[int] = 2
    factory: ClassVar[str] = f"{_DECODERS}:plain_torch"
    sinks: ClassVar[bool] = True


def choose(name: str, device: str, sinks: bool = False) -> str:
    """The implementation that ``name`` means on ``device``, e.g. ``cuda:0``.

    ``sinks``: for a model with attention sinks.

    Raises:
        ValueError: in one line, if it does not run there, with those that do, or if nothing can
            make it.
    """
    kind = device.partition(":")[0]
    named = {other: DECODE_BACKENDS[other] for other in DECODE_BACKENDS}
    running = [
        other
        for other in named
        if kind in named[other].devices and (named[other].sinks or not sinks)
    ]
    running.sort(key=lambda other: named[other].order)
    if running and not DECODE_BACKENDS[name].devices:
        name = running[0]
    if name not in running:
        raise ValueError(
            f"--fairkv-decode-backend {name} does not run on {device}"
            f"{' for a model with attention sinks' if sinks else ''}: use auto or one of "
            + ", ".join(running)
        )
    _check_factory(named[name])
    return name


def _check_factory(backend: type[DecodeBackend]) -> None:
    """What the rank will import exists, as far as that can be said without importing it."""
    module, _, function = backend.factory.partition(":")
    try:
        found = bool(module and function) and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package around it
        found = False
    if not found:
        raise ValueError(
            f"decode backend {backend.name!r} has the factory {backend.factory!r}: it must be the "
            "module:function that makes it, and the module must be installed"
        )
