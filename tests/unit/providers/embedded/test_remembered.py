"""What is kept for those who ask again is bounded in number and in size."""

from headgate.providers.embedded.remembered import Remembered


def test_the_oldest_are_forgotten_first() -> None:
    remembered: Remembered[str, int] = Remembered(2, 100)
    for number, name in enumerate("abc"):
        remembered.put(name, number, 1)
    assert [remembered.get(name) for name in "abc"] == [None, 1, 2]


def test_large_values_push_out_others_but_the_last_one_stays() -> None:
    remembered: Remembered[str, int] = Remembered(10, 100)
    remembered.put("small", 1, 40)
    remembered.put("large", 2, 61)
    assert (remembered.get("small"), remembered.get("large")) == (None, 2)
    remembered.put("huge", 3, 1000)
    assert (remembered.get("large"), remembered.get("huge")) == (None, 3)


def test_a_value_that_is_put_again_counts_once() -> None:
    remembered: Remembered[str, int] = Remembered(10, 100)
    remembered.put("other", 0, 50)
    for number in range(5):
        remembered.put("same", number, 50)
    assert (remembered.get("other"), remembered.get("same")) == (0, 4)
