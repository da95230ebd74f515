# SPDX-License-Identifier: Apache-2.0
"""A server to look at, without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fairkv_tests.fake_server import FakeServer, fake_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server with FairKV on."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with fake_server() as running:
        yield running


@pytest.fixture
def locked_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """The same with the API key ``secret``."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with fake_server("secret") as running:
        yield running
