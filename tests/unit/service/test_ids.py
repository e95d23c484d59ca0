"""Random ids from a pool."""

import itertools
import uuid

from headgate.service.ids import ID_BYTES, POOL_BYTES, Ids


def test_every_id_has_its_own_128_bits() -> None:
    ids = Ids()
    made = [ids.hex() for _ in range(3 * POOL_BYTES // ID_BYTES + 1)]
    assert len(set(made)) == len(made)
    assert {len(one) for one in made} == {32}


def test_no_byte_of_the_pool_is_used_twice_or_left_out() -> None:
    numbers = itertools.count()
    drawn: list[bytes] = []

    def source(count: int) -> bytes:
        drawn.append(b"".join(next(numbers).to_bytes(4, "big") for _ in range(count // 4)))
        return drawn[-1]

    ids = Ids(source)
    count = 2 * POOL_BYTES // ID_BYTES
    made = "".join(ids.hex() for _ in range(count))
    assert bytes.fromhex(made) == b"".join(drawn)
    assert len(drawn) == 2


def test_uuids_are_random_ones_of_version_four() -> None:
    ids = Ids()
    made = [ids.uuid() for _ in range(1000)]
    assert len(set(made)) == 1000
    for text in made:
        parsed = uuid.UUID(text)
        assert (parsed.version, parsed.variant, str(parsed)) == (4, uuid.RFC_4122, text)
