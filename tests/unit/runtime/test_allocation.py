"""The allocator: worked examples, and properties of any cluster and any pools."""

import time
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from wrpo_ray.runtime.allocation import (
    GAIN,
    NEAR,
    WORTH,
    Demand,
    Node,
    Share,
    allocate,
    fits,
    moves,
)


def node(name, gpus=8.0, cpus=64.0, only_gpu=False, **custom) -> Node:
    total = {"CPU": cpus, "GPU": gpus} | custom
    return Node(str(name), total, total, only_gpu)


def demand(pool, gpus, left, **changes) -> Demand:
    fields = {"needs": {"CPU": 1.0, "GPU": float(gpus)}, "most": 64}
    return Demand(pool, left=left, **fields | changes)


def engines(nodes, demands) -> dict[str, int]:
    return {pool: share.engines for pool, share in allocate(nodes, demands).items()}


def free_after(nodes, demands, shares) -> dict[str, dict[str, float]]:
    """What is free when all engines have started that lie on one node."""
    free = {n.name: dict(n.free) for n in nodes}
    for d in demands:
        for (name,) in shares[d.pool].places:
            for resource, n in d.needs.items():
                free[name][resource] = free[name].get(resource, 0.0) - n
    return free


def test_the_pools_end_together():
    """24 GPUs: three times the work is three times the engines; both end after 100 s."""
    nodes = [node(n) for n in range(3)]
    assert engines(nodes, [demand("a", 1, 1800.0), demand("b", 1, 600.0)]) == {"a": 18, "b": 6}


def test_a_gpu_of_a_large_engine_counts_like_one_of_a_small():
    """Four engines of 8 GPUs and 32 of one: as many engine-seconds for each end together."""
    nodes = [node(n) for n in range(8)]
    assert engines(nodes, [demand("s", 1, 3200.0), demand("l", 8, 400.0)]) == {"l": 4, "s": 32}


def test_the_largest_engines_find_whole_nodes():
    """Two nodes: an engine of 8 and of 4 come before those of one GPU, which fill the rest."""
    nodes = [node(n) for n in range(2)]
    shares = allocate(
        nodes, [demand("s", 1, 9e9), demand("m", 4, 1.0, most=1), demand("l", 8, 1.0, most=1)]
    )
    assert {pool: s.engines for pool, s in shares.items()} == {"s": 4, "m": 1, "l": 1}
    (large,), (medium,) = shares["l"].places[0], shares["m"].places[0]
    assert large != medium
    assert set(shares["s"].places) == {(medium,)}


def test_where_not_all_fit_the_largest_is_first():
    """On one node an engine of 8 GPUs leaves nothing; it would never find the node empty again."""
    assert engines([node(0)], [demand("s", 1, 9e9), demand("l", 8, 1.0)]) == {"s": 0, "l": 1}


def test_an_engine_lies_on_one_node_while_any_can_hold_it():
    """Four GPUs are free on each of two nodes of 8: an engine of 8 parts waits for a whole one."""
    half = [replace(node(n), free={"CPU": 64.0, "GPU": 4.0}) for n in range(2)]
    parts = ({"CPU": 1.0}, *[{"GPU": 1.0}] * 8)
    large = demand("l", 8, 100.0, bundles=parts)
    assert allocate(half, [large])["l"] == Share(0, (), gives_way=False)
    small = [node(n, gpus=4.0) for n in range(3)]
    (place,) = allocate(small, [replace(large, most=1)])["l"].places
    assert len(place) == 2  # no node could ever hold it


def test_an_engine_has_to_be_worth_its_start():
    """120 s are left on two engines: with n more of a start of 40 s they end at 60 s or later."""
    few = demand("a", 1, 240.0, startup=40.0, running=2)
    assert few.end(2) == 120
    assert few.end(4) == (240 + 2 * 40) / 4
    assert few.end(8) == (240 + 6 * 40) / 8 == (1 + WORTH) * 40
    assert engines([node(n) for n in range(4)], [few]) == {"a": 8}
    assert few.wanted == 8
    late = replace(few, left=2 * 45.0)
    assert (late.wanted, engines([node(0)], [late])) == (2, {"a": 2})


def test_first_engines_come_before_more_of_others():
    """A running pool with endless work leaves the last GPUs to a pool without an engine."""
    nodes = [replace(node(0), free={"CPU": 8.0, "GPU": 2.0})]
    shares = allocate(nodes, [demand("a", 1, 9e9, running=6), demand("b", 2, 1.0)])
    assert {pool: s.engines for pool, s in shares.items()} == {"a": 6, "b": 1}


def test_a_pool_that_lacks_its_first_engine_is_left_a_node():
    """Half of each node is free, and an engine needs a whole one: the other pool leaves one."""
    nodes = [replace(node(n), free={"CPU": 8.0, "GPU": 4.0}) for n in range(2)]
    shares = allocate(nodes, [demand("a", 1, 9e9, running=8), demand("b", 8, 1.0)])
    assert shares["b"].engines == 0
    assert shares["a"].engines == 12
    assert shares["a"].gives_way
    assert not shares["b"].gives_way


def test_work_without_gpus_fills_holes_and_leaves_the_cpus_of_gpus():
    """A node with 8 GPUs busy is filled first; one with free GPUs keeps a CPU for each of them."""
    busy = replace(node("busy"), free={"CPU": 4.0})
    nodes = [busy, node("idle", cpus=10.0), node("labelled", cpus=99.0, only_gpu=True)]
    cpu = demand("score", 0, 9e9, needs={"CPU": 1.0})
    shares = allocate(nodes, [cpu, demand("a", 1, 1.0, most=1)])
    places = Counter(shares["score"].places)
    assert places == {("busy",): 4, ("idle",): 2}
    assert shares["a"].engines == 1


def test_custom_resources_are_where_they_are():
    nodes = [node("a"), node("b", h100=8.0)]
    shares = allocate(nodes, [demand("p", 1, 9e9, needs={"GPU": 1.0, "h100": 1.0})])
    assert set(shares["p"].places) == {("b",)}
    assert shares["p"].engines == 8


def test_a_thousand_nodes_and_ten_pools_are_quick():
    """8,000 GPUs are given out; the driver does this once a second at the most."""
    nodes = [node(n) for n in range(1000)]
    demands = [demand(f"p{n}", 2 ** (n % 4), 1e6, most=4000) for n in range(10)]
    began = time.process_time()
    shares = allocate(nodes, demands)
    took = time.process_time() - began
    assert sum(s.engines * 2 ** (n % 4) for n, s in enumerate(shares.values())) == 8000
    assert took < 5, took


def uneven(left: float = 600.0) -> list[Demand]:
    """Two nodes without a free GPU; one engine of 8 ends after 2/3 of what two of 4 take."""
    eight = demand("eight", 8, left * 2 / 3 * 2, startup=60.0, running=2)
    return [eight, demand("four", 4, left * 2, startup=60.0, running=2)]


def leaving(demands: list[Demand]) -> dict[str, int]:
    full = [replace(node(n), free={"CPU": 48.0}) for n in range(3)]
    shares = allocate(full, demands)
    return {pool: len(share.leave) for pool, share in shares.items() if share.leave}


def test_near_the_end_an_engine_gives_its_place_to_the_pool_that_ends_last():
    """Left: 240 s of two engines of 8, 360 s of two of 4, whose start takes 60 s.

    One engine of 8 would end after 480 s, so it stays. With three of 8, of 160 s, one can go: the
    others take 240 s, and four engines of 4 (720 + 2 * 60) / 4 = 210 s.
    """
    eight, four = uneven(360.0)
    assert leaving([eight, four]) == {}
    eight = replace(eight, running=3)
    assert leaving([eight, four]) == {"eight": 1}
    score = demand("score", 1, 10.0, running=2, follows=True)
    leaves = [replace(eight, running=2, leaving=1), four, score]
    shares = allocate([node(n) for n in range(3)], leaves)
    assert not shares["score"].gives_way  # else what is idle for a moment would end
    assert not shares["eight"].leave  # none more while one leaves
    assert shares["eight"].gives_way  # what it frees is the other's
    assert not shares["four"].gives_way
    assert shares["four"].engines > 2


def test_engines_stay_where_a_move_gains_nothing():
    eight, four = uneven(360.0)
    moving = [replace(eight, running=3), four]
    far = [replace(d, left=3 * d.left) for d in moving]
    assert far[1].end(2) > NEAR * 60 > moving[1].end(2)
    assert leaving(far) == {}  # what ends by itself serves the others long enough
    assert leaving([moving[0], replace(four, is_timed=False)]) == {}  # nobody knows
    assert leaving([moving[0], replace(four, follows=True)]) == {}
    assert leaving([replace(moving[0], least=3), four]) == {}
    assert leaving([moving[0], replace(four, most=2)]) == {}
    slow = replace(four, startup=120.0)  # (720 + 2 * 120) / 4 = 240: 120 s less, as before
    assert leaving([moving[0], slow]) == {"eight": 1}
    slower = replace(four, startup=400.0)
    assert slower.end(2) - max(moving[0].end(2), slower.end(4)) < GAIN * 400
    assert leaving([moving[0], slower]) == {}


def training(workers: int = 8) -> Demand:
    """Workers of a training, each with a GPU."""
    return Demand("sft", {"GPU": 1.0}, 1.0, least=workers, most=workers, displaces=True)


def displacing(*demands: Demand, workers: int = 8, gpus: float = 0.0) -> dict[str, list[str]]:
    """Four nodes, of which the last has so many free GPUs."""
    nodes = [replace(node(n), free={"CPU": 48.0, "GPU": gpus * (n == 3)}) for n in range(4)]
    shares = allocate(nodes, [*demands, training(workers)])
    return {pool: sorted(share.leave) for pool, share in shares.items() if share.leave}


def held(name: str, gpus: float, left: float, places: str, **changes) -> Demand:
    """A pool without a free GPU, whose engines lie on these nodes and start in 60 s."""
    where = [f"n{place}" for place in places]
    return demand(name, gpus, left, startup=60.0, running=len(where), places=where, **changes)


def test_engines_of_one_node_end_for_a_training_that_would_wait():
    """Ends without the engines of a node: "eight" 2000 s in place of 1000, "four" 1000 s of 600.

    So the engines of "four" on node 2 go; with 4 workers one of them, or none if 4 GPUs are free.
    """
    eight, four = held("eight", 8, 2000.0, "01"), held("four", 4, 3000.0, "22333")
    assert displacing(eight, four) == {"four": ["n2", "n2"]}
    assert displacing(eight, four, workers=4) == {"four": ["n2"]}
    assert displacing(eight, four, workers=4, gpus=4.0) == {}
    assert displacing(eight, four, workers=8, gpus=4.0) == {"four": ["n2"]}
    slow = replace(four, left=9000.0)  # 3000 s without node 2
    assert displacing(eight, slow) == {"eight": ["n0"]}
    assert displacing(eight, slow, workers=10) == {"eight": ["n0"], "four": ["n2"]}


def test_no_engine_ends_for_a_training_where_that_gains_nothing_or_takes_a_pools_last():
    eight, four = held("eight", 8, 2000.0, "01"), held("four", 4, 3000.0, "2233")
    assert displacing(eight, four)
    assert displacing(eight, replace(four, left=200.0)) == {}  # it ends in 50 s
    assert displacing(eight, replace(four, left=200.0, follows=True))  # not before the other
    assert displacing(eight, replace(four, leaving=1)) == {}
    assert displacing(eight, replace(four, is_timed=False)) == {}
    assert displacing(replace(eight, least=2), replace(four, least=3)) == {}
    assert displacing(eight, four, workers=33) == {}
    assert displacing(held("one", 8, 900.0, "0"), held("other", 8, 900.0, "1")) == {}
    other = Demand("lone", {"slot": 1.0}, 500.0, running=2, places=["n0", "n1"])
    assert displacing(eight, four, other) == displacing(eight, four)
    for needs in ({"slot": 1.0}, {"CPU": 1.0, "GPU": 0.0}):  # its own kind of node
        nodes = [replace(node(n), free={}) for n in range(4)]
        shares = allocate(nodes, [eight, four, other, replace(training(), needs=needs)])
        assert not any(share.leave for share in shares.values())
    waiting = replace(training(), displaces=False)
    full = [replace(node(n), free={}) for n in range(4)]
    assert not any(s.leave for s in allocate(full, [eight, four, waiting]).values())


SIZES = st.sampled_from([0, 1, 2, 4, 8])
DEMANDS = st.lists(
    st.builds(
        lambda gpus, left, startup, least, more: demand(
            "", gpus, left, startup=startup, least=least, most=least + more
        ),
        SIZES,
        st.floats(1, 1e5),
        st.floats(0, 600),
        st.integers(1, 2),
        st.integers(0, 30),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: [replace(d, pool=str(n)) for n, d in enumerate(found)])
NODES = st.integers(1, 12).map(lambda count: [node(n, cpus=16.0) for n in range(count)])


def latest(demands, shares) -> float:
    return max(d.end(shares[d.pool].engines) for d in demands)


@settings(max_examples=200)
@given(NODES, DEMANDS)
def test_capacity_is_never_exceeded_and_no_pool_starves(nodes, demands):
    shares = allocate(nodes, demands)
    free = free_after(nodes, demands, shares)
    assert all(n >= -1e-6 for left in free.values() for n in left.values())
    for d in demands:
        assert shares[d.pool].engines <= max(d.most, d.least)
        if not shares[d.pool].engines:  # only where nothing fits, and no other has a second
            assert not any(fits(d.needs, left) for left in free.values())
            larger = [e for e in demands if e.size[0] >= d.size[0] and e.size[0]]
            assert all(shares[e.pool].engines <= 1 for e in larger)


@settings(max_examples=200)
@given(NODES, DEMANDS)
def test_a_larger_cluster_is_never_slower(nodes, demands):
    """Predicted ends: with one node more at most 5 % later."""
    more = [*nodes, node("more", cpus=16.0)]
    assert latest(demands, allocate(more, demands)) <= 1.05 * latest(
        demands, allocate(nodes, demands)
    )


@settings(max_examples=200)
@given(NODES, DEMANDS, st.floats(1, 20))
def test_a_pool_with_more_work_has_never_fewer_engines(nodes, demands, factor):
    first, *others = demands
    grown = replace(first, left=first.left * factor)
    before, after = allocate(nodes, demands), allocate(nodes, [grown, *others])
    assert after[first.pool].engines >= before[first.pool].engines


@settings(max_examples=100)
@given(NODES, DEMANDS)
def test_what_was_given_is_kept(nodes, demands):
    """When all engines have started, a second look neither takes nor gives any."""
    shares = allocate(nodes, demands)
    free = free_after(nodes, demands, shares)
    running = [replace(n, free=free[n.name]) for n in nodes]
    started = [replace(d, running=shares[d.pool].engines) for d in demands]
    again = allocate(running, started)
    for d in demands:
        assert again[d.pool].engines >= shares[d.pool].engines
        assert all(len(place) == 1 for place in again[d.pool].places)


@settings(max_examples=200)
@given(NODES, DEMANDS)
def test_all_end_sooner_with_moves_and_no_pool_is_left_without(nodes, demands):
    """By what is foretold: each engine that leaves makes room for one that is foretold."""
    shares = allocate(nodes, demands)
    running = [replace(d, running=shares[d.pool].engines) for d in demands if d.size[0]]
    running = [d for d in running if d.running]
    found = moves(running, [d.running for d in running])
    by_name = {d.pool: d for d in running}
    for pool, count in found.items():
        assert by_name[pool].running - count >= by_name[pool].least
    if found:
        before = max(d.end(d.running) for d in running)
        stay = [d.end(d.running - found.get(d.pool, 0)) for d in running if d.pool in found]
        assert max(stay) < before
