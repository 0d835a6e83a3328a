"""Where data lies, and who still works on it, on Ray clusters that the tests start and end."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from support.ray_head import free_ports
from support.waiting import LIMIT, wait_until

from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.errors import UserError, WrpoError
from wrpo_ray.runtime import cluster
from wrpo_ray.runtime import pool as pools
from wrpo_ray.runtime.cores import with_shares
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.tasks import MAX_TASKS, map_tasks
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

POOL = Pool("test", Actors())
LONG = """
import sys, ray
from wrpo_ray.config import ClusterConfig
from wrpo_ray.runtime import cluster
from wrpo_ray.runtime.tasks import map_tasks
from wrpo_ray.storage.folder import Folder

cluster.connect(ClusterConfig(num_cpus=1), Folder(sys.argv[1]), "test")
(done,) = map_tasks("look", iter([{"row": 1}]), lambda row: row)
print(done)
cluster.disconnect()
"""


@pytest.mark.parametrize(("name", "length"), [("RAY_TMPDIR", 100), ("TMPDIR", 900)])
def test_ray_starts_with_a_long_temporary_folder(name, length, tmp_path):
    """Its sessions lie in there, where sockets' paths would have more than 107 bytes."""
    folder = tmp_path / ("t" * 100)
    while len(str(folder)) < length:
        folder /= "t" * 100
    folder.mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_TMPDIR", "TMPDIR")}
    result = subprocess.run(
        [sys.executable, "-c", LONG, str(tmp_path)],
        cwd=tmp_path,
        env=env | {name: str(folder)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "{'row': 1}\n", result.stderr
    assert list((folder / "ray").glob("session_2*/sockets"))


def can_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs to mount a folder of a node's own (as root)")
def test_an_output_that_one_node_does_not_see_is_refused(tmp_path, monkeypatch):
    """The second node has an empty file system of its own over the output's folder."""
    output = tmp_path / "local-to-a-node"
    output.mkdir()
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    ray = str(Path(sys.executable).parent / "ray")
    folder = tempfile.mkdtemp(prefix="wrpo-")  # sockets in it have a path of 107 bytes at most
    common = ["--num-cpus=1", "--block", "--disable-usage-stats", f"--temp-dir={folder}"]
    head = [
        ray,
        "start",
        "--head",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        *common,
    ]
    worker = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f"mount -t tmpfs none {output} && exec {ray} start --address={address} "
        f"--node-ip-address=127.0.0.1 {' '.join(common[:3])}",
    ]
    started = []
    try:
        for command in (head, worker):
            started.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            wait_until(lambda: answers(address), started[-1])
        root = Folder(str(output))
        cluster.connect(ClusterConfig(address=address), root, "test")
        wait_until(lambda: len(cluster.nodes()) == 2)
        with pytest.raises(UserError, match="is not seen by 1 of 2 nodes; use an object store"):
            cluster.check_reachable(root)
        assert list(output.iterdir()) == []
    finally:
        cluster.disconnect()
        for process in started:
            end_tree(process)
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    """Whether a cluster listens there."""
    try:
        cluster.check_listening(address)
    except UserError:
        return False
    return True


def end_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        tree = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(LIMIT)


def test_orphans_of_this_output_are_ended_and_others_are_not(local_ray, tmp_path):
    root = Folder(str(tmp_path))

    def sleeper(output: str, session: str) -> subprocess.Popen:
        env = os.environ | {cluster.OUTPUT: output, cluster.SESSION: session}
        return subprocess.Popen(["sleep", str(LIMIT)], env=env)

    mine = sleeper(cluster.output_mark(root), "now")
    foreign = sleeper(digest("elsewhere"), "before")
    orphan = sleeper(cluster.output_mark(root), "before")
    try:
        cluster.kill_orphans(root, "now")
        assert orphan.wait(LIMIT) == -9
        assert mine.poll() is None
        assert foreign.poll() is None
    finally:
        for process in (mine, foreign, orphan):
            process.kill()
            process.wait()


def test_a_node_that_was_lost_just_now_is_passed_over(local_ray, monkeypatch, tmp_path):
    """A listed node whose tasks Ray cannot place any more."""
    listed = [*cluster.nodes(), "ab" * 28]
    monkeypatch.setattr(cluster, "nodes", lambda: listed)
    assert cluster._on_every_node(Folder.exists, Folder(str(tmp_path)), "") == [True]


class Dies:
    """An actor whose process ends at its first call for row 3, and which commits its rows."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def __call__(self, row: dict) -> dict:
        mark = self.folder / f"died-{row['row']}"
        if row["row"] == 3 and not mark.exists():
            mark.touch()
            os._exit(1)
        return row


def test_a_lost_actor_is_replaced_and_its_rows_are_done(local_ray, tmp_path):
    rows = [{"row": i} for i in range(8)]
    pool = Pool("test", Actors(num_cpus=0.5, max=2))
    done = pools.map_rows(pool, rows, Dies, {"folder": str(tmp_path)})
    assert sorted(r["row"] for r in done) == list(range(8))
    assert (tmp_path / "died-3").exists()


def test_a_lost_task_is_tried_again(local_ray, tmp_path):
    rows = ({"row": i} for i in range(2 * MAX_TASKS))
    done = map_tasks("test", rows, Dies(str(tmp_path)))
    assert sorted(r["row"] for r in done) == list(range(2 * MAX_TASKS))
    assert (tmp_path / "died-3").exists()


class Refuses:
    """An actor that raises the project's own error."""

    def __call__(self, row: dict) -> dict:
        raise UserError("cause and remedy")


def test_the_projects_own_errors_come_through_ray(local_ray):
    with pytest.raises(UserError, match="^cause and remedy$"):
        list(pools.map_rows(POOL, [{"row": 1}], Refuses, {}))
    with pytest.raises(UserError, match="^cause and remedy$"):
        list(map_tasks("test", iter([{"row": 1}] * 3), Refuses()))


class Breaks:
    """An actor with a fault of its own."""

    def __call__(self, row: dict) -> dict:
        return {}[row["row"]]


def test_another_error_is_told_with_its_cause(local_ray):
    with pytest.raises(WrpoError, match="^test failed: KeyError: 1; fix the cause"):
        list(pools.map_rows(POOL, [{"row": 1}], Breaks, {}))
    with pytest.raises(WrpoError, match="^test failed: KeyError: 1; fix the cause"):
        list(map_tasks("test", iter([{"row": 1}]), Breaks()))


class Limit:
    """Tells the limit of the cache that it works under."""

    def __call__(self, row):
        return row | {"limit": os.environ["WRPO_CACHE_GB"]}


def test_the_limit_of_the_cache_reaches_the_workers(local_ray):
    pool = Pool("look", Actors(), {"OMP_NUM_THREADS": "1"})
    (row,) = pools.map_rows(pool, [{"n": 0}], Limit, {})
    assert row["limit"] == "20.0"


class Threads:
    """Tells the CPUs that Ray reserves for it, and the threads of torch."""

    def __call__(self, row):
        import ray
        import torch

        reserved = ray.get_runtime_context().get_assigned_resources()["CPU"]
        return row | {"cpus": reserved, "threads": torch.get_num_threads()}


def test_an_actor_has_as_many_threads_as_cpus_and_alone_all_cores(local_ray, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    pool, half = (Pool("look", Actors(max=n), has_model=True) for n in (1, 2))
    given = Pool("look", Actors(num_cpus=2.5), has_model=True)
    cores = min(3, psutil.cpu_count(logical=False) or 3)
    for pools_, expected in (([pool], cores), ([half], max(1, cores // 2)), ([given], 2.5)):
        (shared,) = with_shares(pools_)
        (row,) = pools.map_rows(shared, [{"n": 0}], Threads, {})
        assert (row["cpus"], row["threads"]) == (expected, int(expected))


def test_an_address_where_nothing_answers_is_told_at_once(tmp_path):
    with pytest.raises(UserError, match="nothing answers at 127.0.0.1:9 .*correct the address"):
        cluster.connect(ClusterConfig(address="127.0.0.1:9"), Folder(str(tmp_path)), "test")


TWO_NODES = """
import sys
import threading
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util import get_current_placement_group, placement_group_table
from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.runtime import cluster, pool as pools
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.storage.folder import Folder
from wrpo_ray.errors import UserError, WrpoError
from support.waiting import start_patiently, wait_until


class Parallel:
    \"\"\"Starts its workers in its placement group, as vLLM does.\"\"\"

    def __init__(self, parts, fails):
        self.fails = fails
        place = ray.remote(num_cpus=0, resources={"chip": 1})(Part)
        self.workers = [place.remote() for _ in range(parts)]

    def __call__(self, row):
        if self.fails:
            raise WrpoError("an engine was lost")
        group = get_current_placement_group()
        nodes = ray.get([worker.node.remote() for worker in self.workers])
        return {"nodes": len(set(nodes)), "bundles": group.bundle_count}


class Holds:
    \"\"\"Holds its chip from the first row on, until a file is there.\"\"\"

    def __call__(self, row):
        Path(row["begun"]).touch()
        wait_until(Path(row["until"]).exists)
        return row


class Part:
    def node(self):
        return ray.get_runtime_context().get_node_id()


each = {"num_cpus": 2, "resources": {"chip": 2}}
nodes = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=each))
start_patiently(lambda: nodes.add_node(**each))
shared = Folder(sys.argv[1])
cluster.connect(ClusterConfig(address=nodes.address), shared, "test")
for output in (Folder("out"), shared):
    try:
        cluster.check_reachable(output)
        print("2 nodes: reachable")
    except UserError as error:
        print("2 nodes:", error)
for parts, most, fails in ((2, 2, False), (4, 1, False), (3, 1, True), (4, 1, False)):
    actors = Actors(max=most, num_cpus=0.5, resources={"chip": 1})
    pool = Pool("test", actors, parts=parts)
    rows, arguments = [{"row": i} for i in range(4)], {"parts": parts, "fails": fails}
    try:
        done = list(pools.map_rows(pool, rows, Parallel, arguments))
        spread, bundles = max(d["nodes"] for d in done), done[0]["bundles"]
        told = f"{len(done)} rows, nodes {spread}, bundles {bundles}"
    except WrpoError as error:
        told = str(error)
    states = [group["state"] for group in placement_group_table().values()]
    print(parts, told, set(states), len(states), sep="; ")
folder = Path(sys.argv[1])
held = [{"begun": str(folder / f"begun-{n}"), "until": str(folder / "end")} for n in range(2)]
small = Pool("small", Actors(max=2, num_cpus=0.5, resources={"chip": 1}))
holds = threading.Thread(target=lambda: list(pools.map_rows(small, held, Holds, {})))
holds.start()
wait_until(lambda: all(Path(row["begun"]).exists() for row in held))
whole = Pool("whole", Actors(num_cpus=0.5, resources={"chip": 1}), parts=2)
(done,) = pools.map_rows(whole, [{}], Parallel, {"parts": 2, "fails": False})
print("2 small ones leave a whole node:", done["nodes"])
(folder / "end").touch()
holds.join()
cluster.disconnect()
nodes.shutdown()
"""


def test_on_two_nodes(tmp_path):
    """A relative output is refused, and engines with parts leave no placement group behind.

    Three shapes follow each other on two nodes of two chips: each needs what the one before has
    to give back. Then two engines of one chip lie on one node, so that one of two finds the other.
    """
    result = subprocess.run(
        [sys.executable, "-c", TWO_NODES, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    told = [line for line in result.stdout.splitlines() if line[0].isdigit()]  # none of Ray's own
    remedy = "use an object store (s3://...) or a folder that every node mounts"
    assert told == [
        f"2 nodes: output: out is relative, on a cluster of 2 nodes; {remedy}",
        "2 nodes: reachable",
        "2; 4 rows, nodes 1, bundles 3; {'REMOVED'}; 2",
        "4; 4 rows, nodes 2, bundles 5; {'REMOVED'}; 3",
        "3; an engine was lost; {'REMOVED'}; 4",
        "4; 4 rows, nodes 2, bundles 5; {'REMOVED'}; 5",
        "2 small ones leave a whole node: 1",
    ], result.stderr


class Doubles:
    """An actor that takes two rows at once, and tells how many it had in hand."""

    def __init__(self):
        self.both = threading.Barrier(2)

    def __call__(self, row: dict) -> dict:
        self.both.wait(LIMIT)
        return row | {"twice": 2 * row["bucket"]}


def test_rows_of_a_feed_are_worked_on_as_they_become_ready(local_ray):
    """Two calls in hand at once; a step that nobody follows adds nothing."""
    followed, other = Step("followed"), Step("other")
    ready_queue = pools.ReadyQueue([other, followed])
    pool = Pool("test", Actors(), threads=2)
    rows = [{"job": 1, "bucket": b} for b in range(4)]
    results = pools.map_rows(pool, rows, Doubles, {}, ready_queue)
    done = []
    taker = threading.Thread(target=lambda: done.extend(results))
    taker.start()
    ready_queue.add(Step("nobody's"), 7)
    for bucket in (3, 1):
        ready_queue.add(followed, bucket)
    wait_until(lambda: len(done) == 2)  # none waits for those that are not there yet
    for bucket in (0, 2):
        ready_queue.add(followed, bucket)
    taker.join(LIMIT)
    assert {d["twice"] for d in done[:2]} == {2, 6}
    assert sorted((d["job"], d["bucket"]) for d in done) == [(1, b) for b in range(4)]
