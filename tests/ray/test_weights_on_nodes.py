"""Models on their way to ten nodes with a cache each, from a hub with a limited rate."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.hub_server import Hub, Repo

NODES, SHARDS, SIZE = 10, 12, 400_000
SCRIPT = """
import json, shutil, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity
from support.waiting import start_patiently, wait_until
from wrpo_ray.config import Actors, ClusterConfig
from wrpo_ray.runtime import cluster, pool as pools, prefetch
from wrpo_ray.runtime.placement import Pool
from wrpo_ray.runtime.prefetch import PREFETCH
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.folder import Folder

given, folder = json.loads(sys.argv[1]), Path(sys.argv[2])


def tell(**what):
    print(json.dumps(what), flush=True)
    sys.stdin.readline()


def caches(model):
    return sorted(folder.glob(f"cache-*/{model[0].copy_key(model[1])}"))


class Engine:
    \"\"\"Tells whether its model was there when it started.\"\"\"

    def __init__(self, key):
        self.was_there = (node_cache().folder / key).is_dir()

    def __call__(self, row):
        return row | {"was_there": self.was_there}


def add_node(number):
    env = {"WRPO_CACHE": str(folder / f"cache-{number}"), "HF_HOME": str(folder / f"hf-{number}")}
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "env_vars": env}
    return start_patiently(lambda: nodes.add_node(**node))


def direct(uri):
    return str(Folder(uri).local())


head = {"num_cpus": 0, "object_store_memory": 80 * 2**20}
nodes = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
others = [add_node(number) for number in range(given["nodes"])]
cluster.connect(ClusterConfig(address=nodes.address), Folder(str(folder)), "test")
ids = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
task = ray.remote(num_cpus=1)(direct)
pins = [task.options(scheduling_strategy=Affinity(node, soft=False)) for node in ids]
first = (Folder(given["direct"]), "")
warm = ray.remote(num_cpus=1)(caches)  # a worker on each
warm = [warm.options(scheduling_strategy=Affinity(node, soft=False)) for node in ids]
ray.get([each.remote(first) for each in warm])
tell(ready=len(ids))
began = time.monotonic()
ray.get([pin.remote(given["direct"]) for pin in pins])
tell(direct=time.monotonic() - began)

PREFETCH.open("test")
model = (Folder(given["peers"]), "")
began = time.monotonic()
PREFETCH.want([Pool("engines", Actors(max=given["nodes"]), models=(model,))])
PREFETCH.wait([model])
tell(peers=time.monotonic() - began, copies=list(map(str, caches(model))))

gated = (Folder(given["gated"]), "")
pool = Pool("engines", Actors(min=3, max=3), models=(gated,))
arguments = {"key": gated[0].copy_key()}
rows = list(pools.map_rows(pool, [{"row": n} for n in range(20)], Engine, arguments))
wait_until(lambda: len(caches(gated)) == 3)
tell(rows=[row["was_there"] for row in rows], copies=len(caches(gated)))

prefetch.QUIET = 0.0
wait_until(lambda: not any(site.shelf for site in PREFETCH._sites.values()))
prefetch.QUIET = 60.0
PREFETCH.want([Pool("engines", Actors(max=given["nodes"] + 1), models=(model,))])
late = add_node(given["nodes"])
wait_until(lambda: len(caches(model)) == given["nodes"] + 1)
tell(late=str(folder / f"cache-{given['nodes']}" / model[0].copy_key()))

lossy = (Folder(given["lossy"]), "")
PREFETCH.want([Pool("engines", Actors(max=given["nodes"] + 1), models=(lossy,))])
key = lossy[0].copy_key()
wait_until(lambda: list(folder.glob(f"cache-0/{key}*/model-*")))
nodes.remove_node(others[0], allow_graceful=False)
lost = sorted(folder.glob(f"cache-0/{key}*"))
wait_until(lambda: len([c for c in caches(lossy) if c.parent.name != "cache-0"])
           == given["nodes"])
tell(lossy=[str(c) for c in caches(lossy) if c.parent.name != "cache-0"])

"""
ENDING = """
PREFETCH.close()
cluster.disconnect()
nodes.shutdown()
"""


def add_model(hub: Hub, name: str) -> tuple[str, int]:
    """A model of random weights, and its bytes."""
    files = {f"model-{i:05}-of-{SHARDS:05}.safetensors": os.urandom(SIZE) for i in range(SHARDS)}
    files["config.json"] = b"{}"
    commit = hub.repos.setdefault(name, Repo()).commit(files)
    return f"hf://{name}@{commit}", sum(map(len, files.values()))


def assert_is(copy: str, hub: Hub, name: str) -> None:
    (files,) = hub.repos[name].commits.values()
    assert {p.name: p.read_bytes() for p in Path(copy).iterdir()} == files


def test_ten_nodes_are_one_download(hub, tmp_path):
    """Engines start when their model is there.

    A node that comes later reads from others, although their shelves were ended meanwhile. While
    another model is on its way, a node that has parts of it is lost.
    """
    models = {kind: add_model(hub, f"org/{kind}") for kind in ("direct", "peers", "gated", "lossy")}
    size = models["peers"][1]
    given = {kind: uri for kind, (uri, _) in models.items()} | {"nodes": NODES}
    hub.rate = 3 * size  # of all nodes together
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT + ENDING, json.dumps(given), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def told() -> dict:
            for line in process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
            raise AssertionError(f"it ended with {process.wait()}")

        def go_on() -> None:
            hub.sent = 0
            process.stdin.write("\n")
            process.stdin.flush()

        try:
            assert told() == {"ready": NODES}
            go_on()
            direct = told()["direct"]
            assert hub.sent >= NODES * size
            go_on()
            peers = told()
            print(f"{hub.sent / size:.2f} models of {NODES}; {direct / peers['peers']:.1f}x")
            assert hub.sent <= 2 * size
            assert len(peers["copies"]) == NODES
            for copy in peers["copies"]:
                assert_is(copy, hub, "org/peers")
            go_on()
            assert told() == {"rows": [True] * 20, "copies": 3}
            assert hub.sent <= 2 * size
            go_on()
            assert_is(told()["late"], hub, "org/peers")
            assert hub.sent <= size / SHARDS
            hub.rate = 0.3 * size
            go_on()
            copies = told()["lossy"]
            assert hub.sent <= 3 * size
            for copy in copies:
                assert_is(copy, hub, "org/lossy")
            go_on()
            assert process.wait() == 0
        finally:
            process.kill()
