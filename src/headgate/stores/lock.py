"""The lock a server takes on its data folder: two servers on one SQLite ledger would resolve each other's holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headgate.core.errors import LedgerUnavailable
from headgate.stores.database import make_folder

LOCK_NAME = "headgate.lock"


@contextmanager
def folder_lock(data_dir: Path) -> Iterator[Path]:
    """Hold the folder's exclusive lock; it goes with the process, however that ends. Yields the lock's file.

    LedgerUnavailable, naming the file and the other server's process id, when another server has it.
    """
    make_folder(data_dir)
    path = data_dir / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LedgerUnavailable(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            raise LedgerUnavailable(
                f"{path}: another server runs on this data folder"
                + (f" (process {owner})" if owner else "")
                + "; stop it, or set HEADGATE_DATA_DIR to another folder"
            ) from None
        except OSError as error:
            raise LedgerUnavailable(f"{path}: cannot be locked: {error.strerror}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield path
    finally:
        os.close(descriptor)
