"""core.ports.Files in a folder: one file per upload, a line of JSON that says what it is and then its bytes.

A file's name is its id and nothing that a client chose; its modification time is the moment it expires, so that what
is left of other days is found without opening anything.
"""

import os
import threading
import uuid
from pathlib import Path

import msgspec
import structlog

from headgate.core.errors import LedgerUnavailable, Overloaded
from headgate.core.files import Owner, UploadedFile
from headgate.core.ports import Clock

log = structlog.get_logger("headgate.files")

SWEEP_SECONDS = 60.0
BLOCK = 4096
"""What the smallest file is counted as: the bound on bytes bounds the number of files too."""

_PART = ".part"
_decoder = msgspec.json.Decoder(UploadedFile)


class FolderFiles:
    """The only user of `folder`, which is made where it is missing; LedgerUnavailable when it cannot be used.

    Files that have expired are deleted at the start and, now and then, while others are saved.
    """

    def __init__(self, folder: Path, clock: Clock, max_total_bytes: int) -> None:
        self._folder = folder
        self._clock = clock
        self._most = max_total_bytes
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, int]] = {}
        """When each file expires, and how many bytes it counts."""
        self._total = 0
        self._next_sweep = 0.0
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._take_stock()
            self._sweep()
        except OSError as error:
            raise LedgerUnavailable(f"{folder}: cannot be used for uploads: {error.strerror}") from error

    def save(self, file: UploadedFile, content: bytes) -> None:
        """See core.ports.Files. What is given is kept as it is; its id must be a new UUID."""
        name = _name(file.id)
        if name is None:
            raise ValueError(f"{file.id!r} is not a UUID")
        head = msgspec.json.encode(file)
        size = _counted(len(head) + 1 + len(content))
        self._reserve(name, file.expires, size)
        path = self._folder / name
        part = path.with_suffix(_PART)
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.writelines((head, b"\n", content))
                stream.flush()
                os.fsync(stream.fileno())
            os.utime(part, (file.expires, file.expires))
            part.rename(path)
        except OSError as error:
            log.exception("an upload was not stored")
            part.unlink(missing_ok=True)
            self._forget(name)
            raise Overloaded("The file cannot be stored now; try again later.", retry_after=60) from error

    def load(self, file_id: str, owner: Owner) -> tuple[UploadedFile, bytes] | None:
        name = _name(file_id)
        if name is None:
            return None
        try:
            stored = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        head, _, content = stored.partition(b"\n")
        try:
            file = _decoder.decode(head)
        except (msgspec.DecodeError, UnicodeDecodeError):
            log.warning("an upload is damaged", file=name)
            return None
        if file.owner != owner or file.expires <= self._clock.time() or len(content) != file.size:
            return None
        return file, content

    def _take_stock(self) -> None:
        """What is there; files that were being written when the process died are deleted."""
        for path in self._folder.iterdir():
            if path.suffix == _PART:
                path.unlink()
            elif _name(path.name) == path.name:
                found = path.lstat()
                self._kept[path.name] = (found.st_mtime, _counted(found.st_size))
        self._total = sum(size for _, size in self._kept.values())

    def _reserve(self, name: str, expires: float, size: int) -> None:
        with self._lock:
            if self._clock.time() >= self._next_sweep or self._total + size > self._most:
                self._sweep()
            if self._total + size > self._most:
                raise Overloaded(
                    "There is no room for more files until older ones expire; try again later.",
                    retry_after=60,
                )
            self._kept[name] = (expires, size)
            self._total += size

    def _sweep(self) -> None:
        """Delete what has expired."""
        now = self._clock.time()
        self._next_sweep = now + SWEEP_SECONDS
        for name in [name for name, (expires, _) in self._kept.items() if expires <= now]:
            (self._folder / name).unlink(missing_ok=True)
            self._total -= self._kept.pop(name)[1]

    def _forget(self, name: str) -> None:
        with self._lock:
            self._total -= self._kept.pop(name, (0.0, 0))[1]


def _name(file_id: str) -> str | None:
    """The file's name for this id; None for what is no UUID."""
    try:
        return str(uuid.UUID(file_id))
    except ValueError:
        return None


def _counted(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
