"""The choice of a server and the account of which ones work, without any server."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.engines.fleet import Fleet, backoff_s, spare

URLS = ("http://a", "http://b", "http://c")
KEYS = st.text(max_size=6)


def fleet_of(count=3, *, patience_s=10.0):
    fleet = Fleet(URLS[:count], patience_s=patience_s)
    for server in fleet.servers:
        fleet.came_back(server)
    return fleet


class AnyHistory(RuleBasedStateMachine):
    """Requests, answers, failures, returns and clock jumps in any order."""

    def __init__(self):
        super().__init__()
        self.fleet = Fleet(URLS, patience_s=10.0)
        self.seats = []
        self.now = 100.0

    @rule(key=KEYS)
    def ask(self, key):
        there = [s for s in self.fleet.servers if s.is_in]
        least = min((s.in_flight for s in there), default=0)
        seat = self.fleet.take(key)
        assert (seat is None) == (not there)
        if seat is not None:
            assert seat.server.is_in
            assert seat.server.in_flight <= least + spare(least) + 1
            self.seats.append(seat)

    @precondition(lambda self: self.seats)
    @rule(data=st.data(), good=st.booleans(), asked=st.none() | st.floats(0, 1e6))
    def end(self, data, good, asked):
        seat = self.seats.pop(data.draw(st.integers(0, len(self.seats) - 1)))
        was_in, outages = seat.server.is_in, seat.server.outages
        if good:
            self.fleet.answered(seat)
            assert seat.server.is_in == was_in
        else:
            news = self.fleet.failed(seat, "x", now=self.now, key="k", retry_after_s=asked)
            assert news == (was_in and seat.outage == outages)
            if news:
                assert not seat.server.is_in
                assert self.now < seat.server.retry_at <= self.now + 60
        self.fleet.leave(seat)

    @rule(data=st.data(), passes=st.booleans())
    def trial(self, data, passes):
        server = data.draw(st.sampled_from(self.fleet.servers))
        if server.is_in:
            return
        if passes:
            self.fleet.came_back(server)
        else:
            self.fleet.stay_out(server, "y", now=self.now, key=server.url)

    @rule(step=st.floats(-1e9, 1e9))
    def time_passes(self, step):
        was_lost = self.fleet.lost
        self.now = self.now + step
        self.fleet.tick(self.now)
        assert not (self.fleet.lost and self.fleet.some_in)
        assert not was_lost or self.fleet.lost

    @invariant()
    def seats_are_counted(self):
        for server in self.fleet.servers:
            assert server.in_flight == sum(seat.server is server for seat in self.seats)


TestAnyHistory = AnyHistory.TestCase


@given(st.lists(KEYS, min_size=1, max_size=60), st.integers(1, 3))
def test_the_least_loaded_is_chosen_but_for_what_affinity_allows(keys, count):
    fleet = fleet_of(count)
    for key in keys:
        fleet.take(key)
    loads = [s.in_flight for s in fleet.servers]
    assert sum(loads) == len(keys)
    assert max(loads) - min(loads) <= spare(min(loads)) + 1


def test_equal_affinity_means_one_server_until_it_is_too_loaded():
    fleet = fleet_of()
    chosen = [fleet.take("task 7").server.url for _ in range(12)]
    assert len(set(chosen[: spare(0) + 1])) == 1
    assert len(set(chosen)) > 1


@given(st.lists(KEYS, min_size=1, max_size=30, unique=True), st.sampled_from(URLS))
def test_a_server_that_leaves_moves_only_its_own_requests_and_gets_them_back(keys, leaving):
    fleet = fleet_of()

    def homes():
        found = {}
        for key in keys:
            seat = fleet.take(key)
            found[key] = seat.server.url
            fleet.leave(seat)
        return found

    before = homes()
    gone = next(s for s in fleet.servers if s.url == leaving)
    fleet.stay_out(gone, "x", now=0.0, key="k")
    during = homes()
    assert leaving not in during.values()
    assert all(during[key] == url for key, url in before.items() if url != leaving)
    fleet.came_back(gone)
    assert homes() == before


def test_different_affinities_spread_over_the_servers():
    fleet = fleet_of()
    homes = []
    for n in range(300):
        seat = fleet.take(f"task {n}")
        homes.append(seat.server.url)
        fleet.leave(seat)
    assert all(70 <= homes.count(url) <= 130 for url in URLS)


def test_one_outage_that_breaks_many_requests_counts_once():
    fleet = fleet_of(1)
    seats = [fleet.take("t") for _ in range(5)]
    assert [fleet.failed(s, "x", now=0.0, key="k") for s in seats] == [True, *[False] * 4]
    (server,) = fleet.servers
    assert (server.failures, server.outages) == (1, 1)
    fleet.came_back(server)
    late = seats[0]
    assert not fleet.failed(late, "x", now=1.0, key="k")
    assert server.is_in


def test_backoff_doubles_until_a_real_answer_and_not_only_a_trial_was_good():
    fleet = fleet_of(1)
    (server,) = fleet.servers
    waits = []
    for _ in range(8):
        fleet.failed(fleet.take("t"), "x", now=100.0, key="k")
        waits.append(server.retry_at - 100.0)
        fleet.came_back(server)
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits[:4]))
    assert all(7.5 <= wait <= 15 for wait in waits[4:])
    fleet.answered(fleet.take("t"))
    fleet.failed(fleet.take("t"), "x", now=100.0, key="k")
    assert server.retry_at - 100.0 <= 1


@given(st.integers(1, 10**6), KEYS, st.floats(0.001, 100))
def test_backoff_is_bounded_and_depends_on_nothing_but_its_arguments(failures, key, first_s):
    wait = backoff_s(failures, key, first_s=first_s)
    assert wait == backoff_s(failures, key, first_s=first_s)
    assert 0.5 * first_s <= wait <= max(15.0, first_s)


def test_backoff_differs_between_requests():
    assert len({backoff_s(1, f"r{n}", first_s=1.0) for n in range(50)}) == 50


def test_retry_after_is_followed_but_not_for_ever():
    for asked, least, most in ((5.0, 5.0, 5.0), (0.0, 0.5, 1.0), (1e9, 60.0, 60.0)):
        fleet = fleet_of(1)
        fleet.failed(fleet.take("t"), "busy", now=0.0, key="k", retry_after_s=asked)
        assert least <= fleet.servers[0].retry_at <= most


def test_patience_runs_only_while_every_server_is_out():
    fleet = fleet_of(2, patience_s=3.0)
    first, second = fleet.servers
    fleet.stay_out(first, "x", now=0.0, key="k")
    for now in range(10):
        fleet.tick(float(now))
    assert not fleet.lost
    fleet.stay_out(second, "y", now=9.0, key="k")
    for now in (10.0, 11.0):
        fleet.tick(now)
    assert not fleet.lost
    fleet.tick(12.0)
    assert fleet.lost
    assert fleet.complaints() == "http://a: x; http://b: y"
    fleet.came_back(second)
    fleet.tick(13.0)
    assert not fleet.lost


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_uses_up_no_patience_to_speak_of(jump):
    fleet = Fleet(URLS, patience_s=10.0)
    fleet.tick(0.0)
    fleet.tick(jump)
    assert not fleet.lost
    for n in range(9):
        fleet.tick(jump + n)
    assert fleet.lost == (jump > 0)  # five seconds of a jump count at most
