"""Work ahead of its use: in order, never far ahead, and its errors where they belong."""

import threading

import pytest

from secateur.ahead import AHEAD_BYTES, ahead


def begun(sizes):
    """Tasks of these sizes that give their numbers, and events that tell which have been done."""
    events = [threading.Event() for _ in sizes]

    def task(number):
        events[number].set()
        return number

    return [(size, lambda n=n: task(n)) for n, size in enumerate(sizes)], events


@pytest.mark.parametrize(("size", "most"), [(AHEAD_BYTES, 1), (AHEAD_BYTES // 2, 2), (3 * AHEAD_BYTES, 1)])
def test_what_comes_next_is_done_while_one_is_in_use(size, most):
    tasks, events = begun([size] * 8)
    seen = []
    for number in ahead(tasks):
        # nobody asks for these before this one has been used
        assert all(event.wait(timeout=30) for event in events[: number + 1 + most])
        assert not any(event.is_set() for event in events[number + 1 + most :])
        seen.append(number)
    assert seen == list(range(8))


def test_an_error_comes_where_the_result_would():
    def fail():
        raise ValueError("spoilt")

    results = ahead([(1, lambda: 0), (1, fail)])
    assert next(results) == 0
    with pytest.raises(ValueError, match="spoilt"):
        next(results)


def test_what_is_not_used_is_not_done():
    tasks, events = begun([AHEAD_BYTES] * 8)
    results = ahead(tasks)
    next(results)
    results.close()
    assert not any(event.is_set() for event in events[2:])
    assert list(ahead([])) == []
