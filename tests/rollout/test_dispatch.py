"""Each prompt goes to one server once, whichever servers are slow or lost."""

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from rlhf_pl.rollout.dispatch import Dispatch


def start_threads(dispatch: Dispatch, server: int, threads: int, act: Callable[[int], None]) -> list[threading.Thread]:
    """Start threads of a server that take prompts and act on them."""

    def serve() -> None:
        while (index := dispatch.take(server)) is not None:
            act(index)
            dispatch.mark_done(server)

    started = [threading.Thread(target=serve, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    return started


def join_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("servers", [1, 3])
def test_every_prompt_is_taken_once_and_shares_are_even(servers: int) -> None:
    dispatch = Dispatch(30, servers, 10, first=1)
    taken: list[list[int]] = [[] for _ in range(servers)]
    for threads in [start_threads(dispatch, server, 10, taken[server].append) for server in range(servers)]:
        join_all(threads)
    assert sorted(index for part in taken for index in part) == list(range(30))
    assert {len(part) for part in taken} == {30 // servers}
    assert 0 in taken[1 % servers]


def test_prompts_that_wait_for_a_slow_server_go_to_others() -> None:
    dispatch = Dispatch(40, 2, 2)
    release = threading.Event()
    slow: list[int] = []
    fast: list[int] = []

    def wait(index: int) -> None:
        slow.append(index)
        release.wait(10)

    slow_threads = start_threads(dispatch, 0, 2, wait)
    while len(slow) < 2:
        time.sleep(0.001)
    fast_threads = start_threads(dispatch, 1, 2, fast.append)
    while len(fast) < 38:
        time.sleep(0.001)
    release.set()
    join_all([*slow_threads, *fast_threads])
    assert Counter(slow + fast) == Counter(range(40))


def test_prompts_of_a_lost_server_go_to_others_which_wait_for_them() -> None:
    dispatch = Dispatch(6, 2, 8)
    assert [dispatch.take(0) for _ in range(3)] == [0, 2, 4]
    taken: list[int] = []
    others = start_threads(dispatch, 1, 8, taken.append)
    while len(taken) < 3:
        time.sleep(0.001)
    assert all(thread.is_alive() for thread in others), "prompts may still be put back"
    dispatch.mark_lost(0)
    for index in (0, 2, 4):
        dispatch.put_back(0, index)
    join_all(others)
    assert sorted(taken) == list(range(6))
    assert dispatch.take(0) is None


def test_failures_count_against_a_prompt_unless_the_server_is_lost() -> None:
    dispatch = Dispatch(1, 1, 1)
    for tries in (1, 2):
        assert dispatch.take(0) == 0
        assert dispatch.record_failure(0, 0) == tries
        dispatch.put_back(0, 0)
    assert dispatch.take(0) == 0
    dispatch.put_back(0, 0)
    assert dispatch.take(0) == 0
    assert dispatch.record_failure(0, 0) == 3
    dispatch.stop()
    assert dispatch.take(0) is None


def test_a_prompt_that_fails_at_a_server_goes_to_another() -> None:
    """The first server fails at every prompt, and is the faster one."""
    dispatch = Dispatch(20, 2, 1)
    tries: list[int] = []
    taken: list[int] = []

    def fail() -> None:
        while (index := dispatch.take(0)) is not None:
            tries.append(dispatch.record_failure(0, index))
            dispatch.put_back(0, index)

    failing = threading.Thread(target=fail, daemon=True)
    failing.start()
    join_all(start_threads(dispatch, 1, 1, lambda index: (time.sleep(0.002), taken.append(index))[1]))
    join_all([failing])
    assert sorted(taken) == list(range(20))
    assert set(tries) == {1}


def test_a_prompt_that_failed_at_all_servers_is_tried_again_by_all() -> None:
    dispatch = Dispatch(1, 2, 1)
    for server, tries in ((0, 1), (1, 2), (1, 3), (0, 4)):
        assert dispatch.take(server) == 0
        assert dispatch.record_failure(server, 0) == tries
        dispatch.put_back(server, 0)
