"""What every test runs under: one thread, the same seeds, no network, and in CI no browser test left out."""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Read by torch, transformers and pip when they start, so set before any test file is imported. Commands that a test
# starts inherit them; PIP_NO_INDEX keeps those from downloading a model.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    PIP_NO_INDEX="1",
)

CI = bool(os.environ.get("CI"))

settings.register_profile(
    "dev",
    max_examples=25,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if CI else "dev")


class NetworkBlockedError(RuntimeError):
    """A test tried to leave this machine. Not an ``OSError``: code that handles those must not hide it."""


def _refuse(host: object) -> None:
    """Raise unless ``host``, an address or a name as the socket module takes it, is this machine."""
    text = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
        local = address.is_loopback or address.is_unspecified
    except ValueError:
        local = text in {"localhost", "localhost.", "ip6-localhost", socket.gethostname()}
    if not local:
        raise NetworkBlockedError(f"tests run without a network, and this one wants {text!r}")


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """The socket method with its last argument, an address, looked at first. Unix sockets are local by nature."""

    def call(self: socket.socket, *args: Any) -> Any:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            _refuse(args[-1][0])
        return method(self, *args)

    return call


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse name look-ups and connections that leave this machine; tests/unit/test_conftest.py proves it."""
    lookup = socket.getaddrinfo

    def guarded_lookup(host: Any, *args: Any, **options: Any) -> Any:
        _refuse(host)
        return lookup(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """A command sets up logging for a whole process; afterwards it is as it was before the first test."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.setLevel(logging.WARNING)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    """Start every test from seed 0, with one thread. A library that no test file has imported stays unimported."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


def _find_chromium() -> Path | None:
    names = (os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome")
    return next((Path(path) for path in map(shutil.which, names) if path), None)


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The Chromium that tests marked ``browser`` drive: $CHROMIUM, or the first one on the path."""
    found = _find_chromium()
    if found is None:
        pytest.fail("no Chromium on this machine: apt-get install chromium, or set CHROMIUM to one")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a Chromium, leave browser tests out and say so. Not in CI: there they fail."""
    if CI or _find_chromium():
        return
    reason = "no Chromium on this machine: apt-get install chromium, or set CHROMIUM to one"
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=reason))
