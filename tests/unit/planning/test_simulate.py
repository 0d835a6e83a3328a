"""The simulator against closed forms, conservation, monotonicity."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import Cluster, Policy, Source, _Simulation, simulate

PLAIN = Policy(in_hand=1, ahead=0, barrier=True)


def source(buckets, name="s", **changes) -> Source:
    """One slot, so that an engine of 1 token/s takes as many seconds as its answers have tokens."""
    fields = {"gpus": 1, "engines": 1, "rate": 1.0, "startup": 0.0, "slots": 1, "half": 0}
    return Source(name, buckets=buckets, **fields | changes)


def equal(count, tokens=10.0, answers=1):
    return [[[tokens] * answers]] * count


def test_one_engine_takes_the_sum():
    outcome = simulate([source(equal(7))], Cluster(1, 1), PLAIN)
    assert (outcome.wall, outcome.useful, outcome.answers, outcome.starts) == (70, 70, 7, 1)
    assert outcome.efficiency == 1
    assert outcome.slack == outcome.unused == outcome.starting == 0


def test_engines_divide_equal_buckets_perfectly():
    outcome = simulate([source(equal(64), engines=16)], Cluster(2), PLAIN)
    assert (outcome.wall, outcome.efficiency) == (40, 1)


def test_starts_and_a_last_round_are_lost():
    """Five buckets on two engines: three rounds of 10 s after a start of 7 s."""
    outcome = simulate([source(equal(5), engines=2, startup=7.0)], Cluster(1, 2), PLAIN)
    assert outcome.wall == 7 + 30
    assert outcome.starting == 14
    assert outcome.unused == 10  # the engine without a third bucket gives its GPU back
    assert outcome.efficiency == pytest.approx(50 / 74)


def test_full_slots_make_the_rate_and_a_few_make_less():
    """256 equal answers of 100 tokens at 512 tokens/s: 50 s. Of k alone each is faster."""
    full = source(equal(1, 100.0, 256), rate=512.0, slots=256, half=64)
    assert simulate([full], Cluster(1), PLAIN).wall == pytest.approx(50)
    one = source(equal(1, 100.0), rate=512.0, slots=256, half=64)
    assert simulate([one], Cluster(1), PLAIN).wall == pytest.approx(100 / (512 * 1.25 / 65))


def test_a_chunk_waits_for_the_longest_answer_of_the_one_before():
    """Two slots: [9, 1] then [9, 1] takes 18 with the wait, 10 without: 9, and 1 + 9 beside it."""
    work = [[[9.0, 1.0], [9.0, 1.0]]]
    two = source(work, rate=2.0, slots=2)
    assert two.speed(2) == 1.0
    # with half = 0 an engine's rate does not depend on how many answers there are: alone, twice
    assert simulate([two], Cluster(1), PLAIN).wall == pytest.approx(2 * (1 + 8 / 2))
    assert simulate([two], Cluster(1), Policy(1, 0, barrier=False)).wall == pytest.approx(10)


def test_two_buckets_in_hand_fill_each_others_tails():
    work = [[[9.0, 1.0], [9.0, 1.0]], [[9.0, 1.0], [9.0, 1.0]]]
    long = source(work, rate=2.0, slots=2, half=2)
    one, two = (simulate([long], Cluster(1), Policy(n, 0, barrier=True)).wall for n in (1, 2))
    assert two < one


def test_a_second_source_gets_the_gpus_of_the_first():
    sources = [source(equal(4), "a"), source(equal(4), "b")]
    assert simulate(sources, Cluster(1, 1), PLAIN).wall == 80
    assert simulate(sources, Cluster(1, 2), PLAIN).wall == 40


def test_a_slow_node_takes_longer():
    assert simulate([source(equal(3))], Cluster(1, 1, slow={0: 0.5}), PLAIN).wall == 60


def test_a_lost_nodes_engine_begins_again_where_it_had_committed():
    """Lost at 25 s in its third chunk of 10 s: two are kept, 5 s are redone; seen after 30 s."""
    work = [[[10.0], [10.0], [10.0], [10.0]]]
    outcome = simulate([source(work, startup=3.0)], Cluster(2, 1, lost={0: 28.0}), PLAIN)
    assert outcome.redone == pytest.approx(5)
    assert outcome.wall == 28 + 30 + 3 + 20
    assert outcome.answers == 4


def test_without_a_node_left_it_says_so():
    with pytest.raises(RuntimeError, match="s: no node is left"):
        simulate([source(equal(3))], Cluster(1, 1, lost={0: 5.0}), PLAIN)


LENGTHS = st.lists(
    st.lists(
        st.lists(st.integers(1, 60).map(float), min_size=1, max_size=5), min_size=1, max_size=3
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(LENGTHS, st.integers(1, 2), st.integers(1, 4)), min_size=1, max_size=3),
    st.builds(Policy, st.integers(1, 3), st.integers(0, 2), st.booleans()),
    st.floats(0, 200),
    st.floats(0.2, 1),
)
def test_every_chunk_is_committed_once_whatever_is_lost(pools, policy, second, factor):
    sources = [
        source(work, str(i), gpus=gpus, engines=engines, startup=4.0, slots=3, half=1)
        for i, (work, gpus, engines) in enumerate(pools)
    ]
    simulation = _Simulation(sources, Cluster(3, 2, lost={0: second}, slow={1: factor}), policy)
    outcome = simulation.run()
    for pool in simulation.pools.values():
        assert set(pool.committed.values()) == {1}
    assert outcome.answers == sum(len(c) for s in sources for b in s.buckets for c in b)
    assert outcome.held <= outcome.capacity + 1e-6 or second > outcome.wall
    assert 0 < outcome.efficiency <= 1 + 1e-9


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 8))
def test_more_engines_are_never_slower_than_list_scheduling_allows(work, engines):
    """Of one pool: between the perfect division and that plus the longest bucket (Graham)."""
    outcome = simulate([source(work, engines=engines)], Cluster(1), PLAIN)
    sums = [sum(map(sum, bucket)) for bucket in work]
    perfect = sum(sums) / engines
    assert max(perfect, max(sums)) - 1e-6 <= outcome.wall <= perfect + max(sums) + 1e-6
