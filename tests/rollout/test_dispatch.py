"""Prompts reach servers once each, whoever is slow or lost."""

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from rlhf_pl.rollout.dispatch import Dispatch


def work(dispatch: Dispatch, server: int, threads: int, act: Callable[[int], None]) -> list[threading.Thread]:
    """Threads of a server that take prompts and act on them."""

    def serve() -> None:
        while (index := dispatch.take(server)) is not None:
            act(index)
            dispatch.done(server)

    started = [threading.Thread(target=serve, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    return started


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("servers", [1, 3])
def test_every_prompt_is_drawn_once_and_shares_are_even(servers: int) -> None:
    dispatch = Dispatch(30, servers, 10, first=1)
    drawn: list[list[int]] = [[] for _ in range(servers)]
    for threads in [work(dispatch, place, 10, drawn[place].append) for place in range(servers)]:
        join(threads)
    assert sorted(index for part in drawn for index in part) == list(range(30))
    assert {len(part) for part in drawn} == {30 // servers}
    assert 0 in drawn[1 % servers]


def test_what_waits_for_a_slow_server_goes_to_others() -> None:
    dispatch = Dispatch(40, 2, 2)
    hold = threading.Event()
    slow: list[int] = []
    fast: list[int] = []

    def wait(index: int) -> None:
        slow.append(index)
        hold.wait(10)

    held = work(dispatch, 0, 2, wait)
    while len(slow) < 2:
        time.sleep(0.001)
    quick = work(dispatch, 1, 2, fast.append)
    while len(fast) < 38:
        time.sleep(0.001)
    hold.set()
    join([*held, *quick])
    assert Counter(slow + fast) == Counter(range(40))


def test_the_prompts_of_a_lost_server_go_to_others_which_wait_for_them() -> None:
    dispatch = Dispatch(6, 2, 8)
    taken = [dispatch.take(0) for _ in range(3)]
    assert taken == [0, 2, 4]
    drawn: list[int] = []
    others = work(dispatch, 1, 8, drawn.append)
    while len(drawn) < 3:
        time.sleep(0.001)
    assert all(thread.is_alive() for thread in others), "something may still be given back"
    dispatch.lose(0)
    for index in (0, 2, 4):
        dispatch.give_back(0, index)
    join(others)
    assert sorted(drawn) == list(range(6))
    assert dispatch.take(0) is None


def test_failures_count_against_a_prompt_unless_the_server_is_lost() -> None:
    dispatch = Dispatch(1, 1, 1)
    for tries in (1, 2):
        assert dispatch.take(0) == 0
        assert dispatch.failed(0, 0) == tries
        dispatch.give_back(0, 0)
    assert dispatch.take(0) == 0
    dispatch.give_back(0, 0)
    assert dispatch.take(0) == 0
    assert dispatch.failed(0, 0) == 3
    dispatch.stop()
    assert dispatch.take(0) is None


def test_a_prompt_that_fails_at_a_server_goes_to_one_where_it_has_not() -> None:
    """The first server fails at whatever it is given, and is the quicker one."""
    dispatch = Dispatch(20, 2, 1)
    tries: list[int] = []
    drawn: list[int] = []

    def fail() -> None:
        while (index := dispatch.take(0)) is not None:
            tries.append(dispatch.failed(0, index))
            dispatch.give_back(0, index)

    failing = threading.Thread(target=fail, daemon=True)
    failing.start()
    join(work(dispatch, 1, 1, lambda index: (time.sleep(0.002), drawn.append(index))[1]))
    join([failing])
    assert sorted(drawn) == list(range(20))
    assert set(tries) == {1}


def test_a_prompt_at_which_all_have_failed_is_tried_again_by_all() -> None:
    dispatch = Dispatch(1, 2, 1)
    for server, tries in ((0, 1), (1, 2), (1, 3), (0, 4)):
        assert dispatch.take(server) == 0
        assert dispatch.failed(server, 0) == tries
        dispatch.give_back(server, 0)
