"""The simulator against closed forms, conservation, monotonicity."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import (
    Cluster,
    Gang,
    Pause,
    Policy,
    Source,
    Store,
    _Simulation,
    simulate,
)

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


def test_an_engine_that_leaves_finishes_what_it_has_and_the_last_pool_gets_its_place():
    """Ten GPUs: five engines each, for 1,000 and for 1,200 s of work, so ends after 200 and 240 s.

    After the first end 40 s are left, too little for a start of 30 s. With one engine more for the
    second pool in good time, all end sooner.
    """
    short = source(equal(100), "short", engines=10, startup=30.0)
    long = source(equal(120), "long", engines=10, startup=30.0)
    stays, moves = (
        simulate([short, long], Cluster(1, 10), Policy(moves=moves)) for moves in (False, True)
    )
    assert stays.wall == 30 + 240
    assert moves.wall < stays.wall - 5
    assert moves.answers == stays.answers == 220
    gone = min(span.until for span in moves.spans if span.pool == "short")
    assert (gone - 30) % 10 == 0  # after its bucket
    late = [span.since for span in moves.spans if span.since]
    assert len(late) == moves.starts - stays.starts > 0
    assert min(late) >= gone


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 8))
def test_more_engines_are_never_slower_than_list_scheduling_allows(work, engines):
    """Of one pool: between the perfect division and that plus the longest bucket (Graham)."""
    outcome = simulate([source(work, engines=engines)], Cluster(1), PLAIN)
    sums = [sum(map(sum, bucket)) for bucket in work]
    perfect = sum(sums) / engines
    assert max(perfect, max(sums)) - 1e-6 <= outcome.wall <= perfect + max(sums) + 1e-6


def started(outcome, pool="s") -> list[float]:
    return sorted(span.ready - span.since for span in outcome.spans if span.pool == pool)


def test_a_start_is_a_download_a_load_and_the_rest():
    """100 bytes: 10 s into the node, 100 / (5 x 2) into two GPUs, and 7 s."""
    store = Store(node=10.0, load=5.0)
    large = source(equal(1), gpus=2, startup=7.0, bytes=100.0)
    outcome = simulate([large], Cluster(1, 2, store=store), PLAIN)
    assert started(outcome) == [10 + 10 + 7]
    there = simulate([large], Cluster(1, 2, store=replace(store, on_nodes=True)), PLAIN)
    assert started(there) == [10 + 7]


def test_downloads_share_a_node_and_the_store():
    """Four nodes that could take 10 each from a store of 20: 100 bytes take 20 s, not 10."""
    four = source(equal(8), engines=4, bytes=100.0)
    nodes = Cluster(4, 1, store=Store(node=10.0, total=20.0))
    assert started(simulate([four], nodes, PLAIN)) == pytest.approx([20.0] * 4)
    pair = [source(equal(2), name, bytes=100.0) for name in "ab"]
    one = Cluster(1, 2, store=Store(node=10.0))
    assert started(simulate(pair, one, PLAIN), "a") == pytest.approx([20.0])
    shared = source(equal(4), engines=2, bytes=100.0)  # two engines of a node wait for one copy
    assert started(simulate([shared], one, PLAIN)) == pytest.approx([10.0, 10.0])


def test_weights_from_other_nodes_leave_the_store_once():
    four = source(equal(8), engines=4, bytes=100.0)
    nodes = Cluster(4, 1, store=Store(node=10.0, total=20.0, peers=True))
    assert started(simulate([four], nodes, PLAIN)) == pytest.approx([10.0] * 4)


def test_a_step_takes_as_long_as_its_answers_make_it():
    """Two answers of 10 and 30 tokens: ten steps of 2 s for both, then twenty of 1 s."""
    steps = source([[[10.0, 30.0]]], slots=2, steps=[1.0, 1.0, 2.0])
    assert simulate([steps], Cluster(1), PLAIN).wall == 10 * 2 + 20 * 1


def test_a_bucket_is_scored_when_it_is_answered_and_training_waits_for_its_group():
    """Answers at 10 and 20 s, each scored in 5; then SFT starts in 3 and trains for 40."""
    answers = source(equal(2), "answers")
    scores = source(equal(2, 5.0), "scores", fed_by=[[("answers", 0)], [("answers", 1)]])
    sft = Gang("sft", 1, 40.0, useful=80.0, startup=3.0, after=frozenset({"scores"}))
    outcome = simulate([answers, scores], Cluster(2, 2), PLAIN, [sft])
    assert outcome.ends == {"answers": 20, "scores": 25, "sft": 25 + 3 + 40}
    assert outcome.useful == 20 + 10 + 80
    early = replace(sft, starts_after=frozenset({"answers"}))
    outcome = simulate([answers, scores], Cluster(2, 2), PLAIN, [early])
    assert outcome.ends["sft"] == 25 + 40


def test_a_node_that_is_held_is_free_when_its_training_can_begin():
    """One of two nodes: ten minutes of answers on the other, and SFT after the first group."""
    work = source(equal(60), engines=9, groups=["first"] * 2 + ["rest"] * 58)
    sft = Gang("sft", 1, 40.0, useful=0.0, after=frozenset({"first"}))
    waits = simulate([work], Cluster(2, 1), replace(PLAIN, displaces=False), [sft])
    assert waits.ends["sft"] == 300 + 40
    displaces = simulate([work], Cluster(2, 1), PLAIN, [sft])  # an engine ends, 10 s later
    assert displaces.ends["sft"] == 20 + 40
    assert displaces.answers == waits.answers == 60
    held = simulate([work], Cluster(2, 1, held="sft"), PLAIN, [sft])
    assert held.ends["sft"] == 20 + 40


def test_what_waits_for_nothing_is_told():
    lonely = Pause("select", 1.0, after=frozenset({"sft"}))
    sft = Gang("sft", 1, 1.0, 0.0, after=frozenset({"select"}))
    with pytest.raises(RuntimeError, match="select, sft: what they wait for never comes"):
        simulate([], Cluster(1), PLAIN, [lonely, sft])
