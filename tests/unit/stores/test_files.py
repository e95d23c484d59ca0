"""stores/files.py: uploads in a folder, each for its owner and its time."""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from tests.support.clock import ManualClock

from headgate.core.errors import LedgerUnavailable, Overloaded
from headgate.core.files import Owner, UploadedFile
from headgate.core.ports import Files
from headgate.stores.files import BLOCK, RESERVED_SECONDS, SWEEP_SECONDS, FolderFiles

KEPT = 3600
ANN = Owner(account="ann", app="story", user="u1")
PNG = b"\x89PNG\r\n\x1a\n\nmore\n\x00lines\n"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def store(
    folder: Path, clock: ManualClock, blocks: int = 1000, *, each: int = 1000, files_each: int = 1000
) -> FolderFiles:
    return FolderFiles(folder / "files", clock, blocks * BLOCK, each * BLOCK, files_each)


def upload(clock: ManualClock, content: bytes = PNG, *, owner: Owner = ANN, kept: int = KEPT) -> UploadedFile:
    created = int(clock.time())
    return UploadedFile(
        id=str(uuid.uuid4()),
        owner=owner,
        name="../../etc/cät.png",
        extension="png",
        media_type="image/png",
        size=len(content),
        created=created,
        expires=created + kept,
    )


def on_disk(folder: Path) -> set[str]:
    """Ids of uploads, and names of other things."""
    return {path.name[:36] for path in (folder / "files").iterdir()}


def path_of(folder: Path, file: UploadedFile) -> Path:
    (path,) = (folder / "files").glob(f"{file.id}*")
    return path


def test_what_is_saved_is_loaded_whole(tmp_path: Path, clock: ManualClock) -> None:
    files: Files = store(tmp_path, clock)
    file = upload(clock)
    files.save(file, PNG)
    assert files.load(file.id, ANN) == (file, PNG)
    assert files.load(file.id.upper(), ANN) == (file, PNG)
    assert on_disk(tmp_path) == {file.id}


def test_it_survives_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    file = upload(clock)
    store(tmp_path, clock).save(file, PNG)
    clock.advance(KEPT - 1)
    assert store(tmp_path, clock).load(file.id, ANN) == (file, PNG)


def test_no_other_user_of_the_machine_can_read_it(tmp_path: Path, clock: ManualClock) -> None:
    file = upload(clock)
    store(tmp_path, clock).save(file, PNG)
    assert (tmp_path / "files").stat().st_mode & 0o777 == 0o700
    assert path_of(tmp_path, file).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "other",
    [
        {"account": "bob"},
        {"app": "other"},
        {"app": None},
        {"user": "u2"},
        {"user": None},
        {"user": "U1"},
        {"account": "ann\n"},
    ],
)
def test_somebody_else_s_file_is_as_unknown_as_none(
    tmp_path: Path, clock: ManualClock, other: dict[str, str | None]
) -> None:
    files = store(tmp_path, clock)
    file = upload(clock)
    files.save(file, PNG)
    assert files.load(file.id, msgspec.structs.replace(ANN, **other)) is None
    assert files.load(str(uuid.uuid4()), ANN) is None


def test_nobody_and_somebody_are_different_users(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock)
    nobody = Owner(account="ann", app="story", user=None)
    file = upload(clock, owner=nobody)
    files.save(file, PNG)
    assert files.load(file.id, nobody) == (file, PNG)
    assert files.load(file.id, ANN) is None


@pytest.mark.parametrize(
    "file_id",
    [
        "",
        ".",
        "..",
        "x",
        "../secret",
        "/etc/passwd",
        "secret",
        "a\x00b",
        "0" * 31,
        "0" * 33,
        "\ud800",
        "x" * 100_000,
    ],
)
def test_an_id_that_is_no_uuid_never_becomes_a_path(tmp_path: Path, clock: ManualClock, file_id: str) -> None:
    files = store(tmp_path, clock)
    file = upload(clock)
    for place in (tmp_path / "secret", tmp_path / "files" / "secret"):
        place.write_bytes(msgspec.json.encode(file) + b"\n" + PNG)
    assert files.load(file_id, ANN) is None
    with pytest.raises(ValueError, match="UUID"):
        files.save(msgspec.structs.replace(file, id=file_id), PNG)
    assert on_disk(tmp_path) == {"secret"}


def test_an_expired_file_is_gone_at_once_and_deleted_while_others_are_saved(
    tmp_path: Path, clock: ManualClock
) -> None:
    files = store(tmp_path, clock)
    old, lasting = upload(clock), upload(clock, kept=10 * KEPT)
    files.save(old, PNG)
    files.save(lasting, PNG)
    clock.advance(KEPT - 1)
    assert files.load(old.id, ANN) is not None
    clock.advance(1)
    assert files.load(old.id, ANN) is None
    clock.advance(SWEEP_SECONDS)
    new = upload(clock)
    files.save(new, PNG)
    assert on_disk(tmp_path) == {lasting.id, new.id}


def test_expired_and_half_written_files_are_deleted_at_the_start(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock)
    old, lasting = upload(clock), upload(clock, kept=10 * KEPT)
    files.save(old, PNG)
    files.save(lasting, PNG)
    (tmp_path / "files" / f"{uuid.uuid4()}.part").write_bytes(b"half")
    (tmp_path / "files" / "README").write_text("somebody else's")
    clock.advance(KEPT)
    again = store(tmp_path, clock)
    assert on_disk(tmp_path) == {lasting.id, "README"}
    assert again.load(lasting.id, ANN) == (lasting, PNG)


def test_when_it_is_full_saving_is_refused_in_words_until_something_expires(
    tmp_path: Path, clock: ManualClock
) -> None:
    files = store(tmp_path, clock, blocks=4)
    content = PNG.ljust(2 * BLOCK - 1000, b"x")
    first, second, third = (upload(clock, content, kept=kept) for kept in (10, KEPT, KEPT))
    files.save(first, content)
    files.save(second, content)
    with pytest.raises(Overloaded, match="no room"):
        files.save(third, content)
    with pytest.raises(Overloaded, match="no room"):
        store(tmp_path, clock, blocks=4).save(third, content)
    assert on_disk(tmp_path) == {first.id, second.id}
    clock.advance(10)
    files.save(third, content)
    assert on_disk(tmp_path) == {second.id, third.id}


def test_many_tiny_files_fill_it_too(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock, blocks=3)
    for _ in range(3):
        files.save(upload(clock), PNG)
    with pytest.raises(Overloaded):
        files.save(upload(clock), PNG)


def test_one_account_s_bytes_are_bounded_and_another_s_room_is_left(
    tmp_path: Path, clock: ManualClock
) -> None:
    files = store(tmp_path, clock, each=2)
    first = upload(clock, kept=10)
    files.save(first, PNG)
    files.save(upload(clock, owner=Owner(account="ann", app="other", user="u2")), PNG)
    with pytest.raises(Overloaded, match=f"at most {2 * BLOCK} bytes"):
        files.save(upload(clock), PNG)
    bob = Owner(account="bob", app="story", user="u1")
    files.save(upload(clock, owner=bob), PNG)
    with pytest.raises(Overloaded, match="This account"):  # also after a restart
        store(tmp_path, clock, each=2).save(upload(clock), PNG)
    clock.advance(10)
    files.save(upload(clock), PNG)
    assert first.id not in on_disk(tmp_path)


def test_one_account_s_files_are_counted(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock, files_each=2)
    for _ in range(2):
        files.save(upload(clock), PNG)
    with pytest.raises(Overloaded, match="at most 2 files"):
        files.save(upload(clock), PNG)
    files.save(upload(clock, owner=Owner(account="bob", app=None, user=None)), PNG)
    assert len(on_disk(tmp_path)) == 3


def test_what_is_reserved_is_as_good_as_taken_until_it_is_released(
    tmp_path: Path, clock: ManualClock
) -> None:
    files = store(tmp_path, clock, blocks=4)
    coming = str(uuid.uuid4())
    assert files.reserve(coming, "ann", 3 * BLOCK) == tmp_path / "files"
    with pytest.raises(Overloaded, match="no room"):
        files.reserve(str(uuid.uuid4()), "bob", 2 * BLOCK)
    with pytest.raises(Overloaded, match="no room"):
        files.save(upload(clock, bytes(BLOCK)), bytes(BLOCK))
    files.release(coming, "ann")
    files.release(coming, "ann")
    files.reserve(str(uuid.uuid4()), "bob", 4 * BLOCK)


def test_an_upload_is_saved_in_the_room_that_was_reserved_for_it(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock, blocks=4)
    file = upload(clock)
    files.reserve(file.id, "ann", 4 * BLOCK)
    files.save(file, PNG)
    files.release(file.id, "ann")
    assert files.load(file.id, ANN) == (file, PNG)
    files.reserve(str(uuid.uuid4()), "ann", 3 * BLOCK)  # what it does not need is free
    with pytest.raises(Overloaded):
        files.reserve(str(uuid.uuid4()), "ann", 1)


def test_reservations_count_among_an_account_s_files(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock, each=3, files_each=2)
    files.reserve(str(uuid.uuid4()), "ann", 2 * BLOCK)
    with pytest.raises(Overloaded, match="bytes together"):
        files.reserve(str(uuid.uuid4()), "ann", 2 * BLOCK)
    files.reserve(str(uuid.uuid4()), "ann", 1)
    with pytest.raises(Overloaded):
        files.reserve(str(uuid.uuid4()), "ann", 0)


def test_a_reservation_that_nobody_released_ends_by_itself(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock, blocks=1)
    files.reserve(str(uuid.uuid4()), "ann", 1)
    clock.advance(RESERVED_SECONDS)
    file = upload(clock)
    files.save(file, PNG)
    assert files.load(file.id, ANN) == (file, PNG)


def test_being_full_is_said_without_going_through_all_files_again(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = store(tmp_path, clock, blocks=1)
    files.save(upload(clock), PNG)
    swept: list[FolderFiles] = []
    monkeypatch.setattr(FolderFiles, "_sweep", swept.append)
    with pytest.raises(Overloaded):
        files.save(upload(clock), PNG)
    assert swept == []


def test_threads_together_never_go_beyond_the_bound(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock, blocks=5)

    def save(_: int) -> bool:
        try:
            files.save(upload(clock), PNG)
        except Overloaded:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(save, range(40))) == 5
    assert len(on_disk(tmp_path)) == 5


def test_a_disk_that_refuses_is_said_and_leaves_nothing(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = store(tmp_path, clock, blocks=1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(Overloaded, match="cannot be stored now"):
            files.save(upload(clock), PNG)
    assert on_disk(tmp_path) == set()
    file = upload(clock)
    files.save(file, PNG)  # the room that the first one took is free again
    assert files.load(file.id, ANN) == (file, PNG)


@pytest.mark.parametrize("stored", [b"", b"{", b"\xff\n", b"{}\nx", b'{"id": "\xff"}\n'])
def test_a_damaged_file_is_none(tmp_path: Path, clock: ManualClock, stored: bytes) -> None:
    files = store(tmp_path, clock)
    file = upload(clock)
    files.save(file, PNG)
    path_of(tmp_path, file).write_bytes(stored)
    assert files.load(file.id, ANN) is None


def test_a_file_cut_short_is_none(tmp_path: Path, clock: ManualClock) -> None:
    files = store(tmp_path, clock)
    file = upload(clock)
    files.save(file, PNG)
    path = path_of(tmp_path, file)
    path.write_bytes(path.read_bytes()[:-1])
    assert files.load(file.id, ANN) is None


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, clock: ManualClock) -> None:
    (tmp_path / "files").write_text("in the way")
    with pytest.raises(LedgerUnavailable, match=r"files: cannot be used for uploads: "):
        store(tmp_path, clock)
