"""The data folder and its lock: two servers on one SQLite ledger would resolve each other's holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headgate.core.errors import LedgerUnavailable

LOCK_NAME = "headgate.lock"


def make_folder(folder: Path) -> None:
    """Create the data folder, readable by its owner only. One that exists keeps its mode."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerUnavailable(f"{folder}: cannot be used as the data folder: {error.strerror}") from error


@contextmanager
def folder_guard(folder: Path) -> Iterator[None]:
    """One process at a time, for the moment in which a file of the folder is made or its lock is looked at."""
    # The folder is locked, not the database: closing a second descriptor of that drops SQLite's own locks.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def server_runs(data_dir: Path) -> bool:
    """Whether a server, be it this process, has the folder's lock. To be asked inside `folder_guard`."""
    try:
        descriptor = os.open(data_dir / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def server_pid(data_dir: Path) -> int | None:
    """The process id of the server that has the folder's lock, or None."""
    try:
        with folder_guard(data_dir):
            if not server_runs(data_dir):
                return None
            written = (data_dir / LOCK_NAME).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(written) if written.isdigit() else None


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
            with folder_guard(data_dir):
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
