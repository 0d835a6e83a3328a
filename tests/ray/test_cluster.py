"""Where data lies, and who still works on it, on Ray clusters that the tests start and end."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.core import cluster
from wrpo_ray.core.records import digest
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError, WrpoError

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
from wrpo_ray.config import ClusterConfig
from wrpo_ray.core import cluster
from wrpo_ray.core.storage import Folder
from wrpo_ray.errors import UserError

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes.add_node(num_cpus=1)
for output in sys.argv[1:]:
    root = Folder(output)
    cluster.connect(ClusterConfig(address=nodes.address), root, "test")
    try:
        cluster.check_reachable(root)
        print("reachable")
    except UserError as error:
        print(error)
    cluster.disconnect()
nodes.shutdown()
"""


def test_on_two_nodes_a_relative_output_is_refused_and_a_shared_one_is_not(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", TWO_NODES, "out", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    relative, shared = result.stdout.splitlines()
    assert "output: out is relative, on a cluster of 2 nodes; use an object store" in relative
    assert shared == "reachable"


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
    address = f"127.0.0.1:{6399}"
    ray = str(Path(sys.executable).parent / "ray")
    folder = tempfile.mkdtemp(prefix="wrpo-")  # sockets in it have a path of 107 bytes at most
    common = ["--num-cpus=1", "--block", "--disable-usage-stats", f"--temp-dir={folder}"]
    head = [
        ray,
        "start",
        "--head",
        "--port=6399",
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
            time.sleep(5)
        root = Folder(str(output))
        cluster.connect(ClusterConfig(address=address), root, "test")
        wait_for(lambda: len(cluster.nodes()) == 2)
        with pytest.raises(UserError, match="is not seen by 1 of 2 nodes; use an object store"):
            cluster.check_reachable(root)
        assert list(output.iterdir()) == []
    finally:
        cluster.disconnect()
        for process in started:
            end_tree(process)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(is_true) -> None:
    for _ in range(120):
        if is_true():
            return
        time.sleep(0.5)
    raise TimeoutError


def end_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        tree = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(20)


def test_orphans_of_this_output_are_ended_and_others_are_not(local_ray, tmp_path):
    root = Folder(str(tmp_path))

    def sleeper(output: str, session: str) -> subprocess.Popen:
        env = os.environ | {cluster.OUTPUT: output, cluster.SESSION: session}
        return subprocess.Popen(["sleep", "60"], env=env)

    mine = sleeper(cluster.mark(root), "now")
    foreign = sleeper(digest("elsewhere"), "before")
    orphan = sleeper(cluster.mark(root), "before")
    try:
        cluster.end_orphans(root, "now")
        assert orphan.wait(10) == -9
        assert mine.poll() is None
        assert foreign.poll() is None
    finally:
        for process in (mine, foreign, orphan):
            process.kill()
            process.wait()


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
    done = cluster.map_rows(
        "test", rows, Dies, {"folder": str(tmp_path)}, Actors(num_cpus=0.5, max=2)
    )
    assert sorted(r["row"] for r in done) == list(range(8))
    assert (tmp_path / "died-3").exists()


class Refuses:
    """An actor that raises the project's own error."""

    def __call__(self, row: dict) -> dict:
        raise UserError("cause and remedy")


def test_the_projects_own_errors_come_through_ray(local_ray):
    with pytest.raises(UserError, match="^cause and remedy$"):
        list(cluster.map_rows("test", [{"row": 1}], Refuses, {}, Actors()))


class Breaks:
    """An actor with a fault of its own."""

    def __call__(self, row: dict) -> dict:
        return {}[row["row"]]


def test_another_error_is_told_with_its_cause(local_ray):
    with pytest.raises(WrpoError, match="^test failed: KeyError: 1; put the cause right"):
        list(cluster.map_rows("test", [{"row": 1}], Breaks, {}, Actors()))


def test_an_address_where_nothing_answers_is_told_at_once(tmp_path):
    with pytest.raises(UserError, match="nothing answers at 127.0.0.1:9 .*correct the address"):
        cluster.connect(ClusterConfig(address="127.0.0.1:9"), Folder(str(tmp_path)), "test")
