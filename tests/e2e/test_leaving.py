"""A node whose pod is about to end: no new work, what runs may end, and then it is gone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import ray
from support.ray_head import RayHead
from support.waiting import wait_until

from wrpo_ray.runtime.leaving import leave

IP = "127.0.0.2"  # of the node, and not of the head


@ray.remote(num_cpus=0, resources={"far": 0.5})
class Work:
    """What runs on the node."""

    def done(self) -> bool:
        return True


@contextmanager
def far_node(head: RayHead) -> Iterator[subprocess.Popen[bytes]]:
    """A node with an address of its own, and this process connected to the cluster."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    command += [f"--address={head.address}", f"--node-ip-address={IP}", '--resources={"far": 1}']
    command += [f"--temp-dir={head.folder / 'far'}", "--object-store-memory=100000000"]
    with (head.folder / "far.log").open("w") as log:
        node = subprocess.Popen(command, env=head.env, stdout=log, stderr=subprocess.STDOUT)
    ray.init(address=head.address, log_to_driver=False)
    try:
        wait_until(lambda: ray.cluster_resources().get("far") == 1, node)
        yield node
    finally:
        ray.shutdown()


def test_a_node_that_is_told_to_leave_ends_its_work_and_takes_no_other():
    with RayHead(1) as head, far_node(head), ThreadPoolExecutor() as threads:
        running = Work.remote()
        assert ray.get(running.done.remote())
        assert not leave(head.address, IP, 0), "it has work, and no time"
        left = threads.submit(leave, head.address, IP, 60)
        refused = Work.remote()
        ready, _ = ray.wait([refused.done.remote()], timeout=2)
        assert not ready, "a node that leaves has started something"
        assert ray.get(running.done.remote()), "what runs goes on"
        assert not left.done()
        ray.kill(refused)
        ray.kill(running)
        assert left.result(60)
        assert leave(head.address, IP, 0), "it is gone already"
