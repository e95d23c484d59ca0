import subprocess
import sys
from pathlib import Path

import pytest

from headgate.core.errors import LedgerUnavailable
from headgate.stores.lock import LOCK_NAME, folder_lock

HOLDER = """
import pathlib, sys
from headgate.stores.lock import folder_lock
with folder_lock(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_server_is_told_which_file_and_whose_it_is(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == b"locked\n"
        with pytest.raises(LedgerUnavailable) as refusal, folder_lock(tmp_path):
            pass
        assert str(tmp_path / LOCK_NAME) in refusal.value.message
        assert f"another server runs on this data folder (process {server.pid})" in refusal.value.message
        server.kill()
    with folder_lock(tmp_path) as path:
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_lock_can_be_taken_again_after_release(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path) as path:
        assert path == tmp_path / LOCK_NAME
