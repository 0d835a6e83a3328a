"""`python -m wrpo_ray.runtime.leaving SECONDS`: what a pod of Ray does before it is ended.

Kubernetes ends a pod by a signal at which Ray's node stops at once. Told before, Ray starts no more
on it, Ray Serve moves its replicas elsewhere while they finish their answers, and Ray Train knows
of the end. Nothing happens here where the cluster has gone, as at the end of a run.
"""

import os
import sys
import time

POLL = 1.0
"""Seconds between looks at the node."""


def leave(address: str, node_ip: str, seconds: float) -> bool:
    """Announce the end of a node within some seconds, and wait until it has left the cluster.

    Returns whether it has left. That is so once nothing runs on it.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.exceptions import RpcError

    deadline = time.time() + seconds
    try:
        gcs = GcsClient(address=address)
        nodes = gcs.get_all_node_info(timeout=5).items()
        alive = GcsNodeInfo.GcsNodeState.ALIVE
        here = [n for n, i in nodes if i.node_manager_address == node_ip and i.state == alive]
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        for node in here:
            gcs.drain_node(node.hex(), reason, "its pod is being ended", int(deadline * 1000))
        while any(gcs.check_alive(here, timeout=5)):
            if time.time() >= deadline:
                return False
            time.sleep(POLL)
    except RpcError:
        pass  # the head is gone, and the cluster with it
    return True


if __name__ == "__main__":
    os.environ |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # then Ray ends this process
    from ray.util import get_node_ip_address

    leave(os.environ["RAY_ADDRESS"], get_node_ip_address(), float(sys.argv[1]))
