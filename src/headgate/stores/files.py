"""core.ports.Files in a folder: one file per upload, a line of JSON that says what it is and then its bytes.

A file's name is its id and a digest of its account, nothing that a client chose; its modification time is the moment
it expires. So what is left of other days, and whose it is, is found without opening anything.
"""

import hashlib
import math
import os
import re
import threading
import uuid
from pathlib import Path

import msgspec
import structlog

from headgate.config.settings import ACCOUNT_BYTES
from headgate.core.errors import LedgerUnavailable, Overloaded
from headgate.core.files import Owner, UploadedFile
from headgate.core.ports import Clock

log = structlog.get_logger("headgate.files")

SWEEP_SECONDS = 60.0
BLOCK = 4096
"""What the smallest file is counted as: the bound on bytes bounds the number of files too."""
MAX_ACCOUNT_FILES = 1000
RESERVED_SECONDS = 3600.0

_PART = ".part"
_STORED = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-([0-9a-f]{16})")
"""A file's name: its id, and the group for its account."""
_decoder = msgspec.json.Decoder(UploadedFile)


class FolderFiles:
    """The only user of `folder`, which is made where it is missing; LedgerUnavailable when it cannot be used.

    Files that have expired are deleted at the start and, now and then, while others are saved.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        max_total_bytes: int,
        max_account_bytes: int = ACCOUNT_BYTES,
        max_account_files: int = MAX_ACCOUNT_FILES,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._most = max_total_bytes
        self._most_each = max_account_bytes
        self._most_files_each = max_account_files
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, int]] = {}
        """When each file expires, and how many bytes it counts; also of those that room is reserved for."""
        self._reserved: set[str] = set()
        self._total = 0
        self._used: dict[str, tuple[int, int]] = {}
        """Each account's files and bytes."""
        self._next_sweep = 0.0
        self._first_expiry = math.inf
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._take_stock()
            self._sweep()
        except OSError as error:
            raise LedgerUnavailable(f"{folder}: cannot be used for uploads: {error.strerror}") from error

    def reserve(self, file_id: str, account: str, size: int) -> Path:
        """See core.ports.Files. The id must be a new UUID."""
        name = _new_name(file_id, account)
        self._take(name, self._clock.time() + RESERVED_SECONDS, _counted(size), reserved=True)
        return self._folder

    def release(self, file_id: str, account: str) -> None:
        name = _name(file_id, account)
        with self._lock:
            if name in self._reserved:
                self._drop(name)

    def save(self, file: UploadedFile, content: bytes) -> None:
        """See core.ports.Files. What is given is kept as it is; its id must be a UUID that no other file has."""
        name = _new_name(file.id, file.owner.account)
        head = msgspec.json.encode(file)
        self._take(name, file.expires, _counted(len(head) + 1 + len(content)))
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
            with self._lock:
                self._drop(name)
            raise Overloaded("The file cannot be stored now; try again later.", retry_after=60) from error

    def load(self, file_id: str, owner: Owner) -> tuple[UploadedFile, bytes] | None:
        name = _name(file_id, owner.account)
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
            elif _STORED.fullmatch(path.name):
                found = path.lstat()
                self._add(path.name, found.st_mtime, _counted(found.st_size))

    def _take(self, name: str, expires: float, size: int, *, reserved: bool = False) -> None:
        """Count a file, in the place of what was reserved for it. Overloaded when there is no room for it."""
        with self._lock:
            now = self._clock.time()
            # Without room everybody comes here: nothing is looked for unless something has expired.
            if now >= self._next_sweep or (now >= self._first_expiry and self._lacking(name, size)):
                self._sweep()
            lacking = self._lacking(name, size)
            if lacking is not None:
                raise Overloaded(
                    f"{lacking} until older ones expire; try again later.",
                    retry_after=60,
                )
            self._drop(name)
            self._add(name, expires, size)
            if reserved:
                self._reserved.add(name)

    def _lacking(self, name: str, size: int) -> str | None:
        """What keeps the file out, or None."""
        files, used = self._used.get(_account_in(name), (0, 0))
        held = self._kept.get(name)
        more = size if held is None else size - held[1]
        if self._total + more > self._most:
            return "There is no room for more files"
        if used + more > self._most_each:
            return f"This account's files may have at most {self._most_each} bytes together: no room"
        if held is None and files >= self._most_files_each:
            return f"This account may keep at most {self._most_files_each} files: no room"
        return None

    def _add(self, name: str, expires: float, size: int) -> None:
        account = _account_in(name)
        files, used = self._used.get(account, (0, 0))
        self._used[account] = (files + 1, used + size)
        self._kept[name] = (expires, size)
        self._total += size
        self._first_expiry = min(self._first_expiry, expires)

    def _drop(self, name: str) -> None:
        """Forget a file, if there is one of this name."""
        self._reserved.discard(name)
        _, size = self._kept.pop(name, (0.0, 0))
        if size:
            account = _account_in(name)
            files, used = self._used.pop(account)
            if files > 1:
                self._used[account] = (files - 1, used - size)
            self._total -= size

    def _sweep(self) -> None:
        """Delete what has expired."""
        now = self._clock.time()
        self._next_sweep = now + SWEEP_SECONDS
        for name in [name for name, (expires, _) in self._kept.items() if expires <= now]:
            (self._folder / name).unlink(missing_ok=True)
            self._drop(name)
        self._first_expiry = min((expires for expires, _ in self._kept.values()), default=math.inf)


def _name(file_id: str, account: str) -> str | None:
    """The file's name for this id of this account; None for what is no UUID."""
    try:
        return f"{uuid.UUID(file_id)}-{hashlib.blake2b(account.encode(), digest_size=8).hexdigest()}"
    except ValueError:
        return None


def _new_name(file_id: str, account: str) -> str:
    name = _name(file_id, account)
    if name is None:
        raise ValueError(f"{file_id!r} is not a UUID")
    return name


def _account_in(name: str) -> str:
    return name[-16:]


def _counted(size: int) -> int:
    """At least one block, also of what is empty."""
    return max(1, -(-size // BLOCK)) * BLOCK
