"""What the tests of the egress package share."""

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture
def unused_url() -> Iterator[str]:
    """Nobody listens there."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"
