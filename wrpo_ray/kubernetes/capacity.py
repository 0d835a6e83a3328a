"""Whether a Ray cluster has room for a request, told by Ray's own KubeRay code and autoscaler.

Ray derives the autoscaler's node types from the RayCluster, and its scheduler says which nodes it
would start for a request from nothing. Private code of Ray's, of the pinned version.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

from wrpo_ray.kubernetes.ray_objects import Cluster, RayObject
from wrpo_ray.kubernetes.resource_requests import Needs, Request

HEAD = "headgroup"


@dataclass(frozen=True)
class NodeTypes:
    """The kinds of nodes that an autoscaler may start."""

    config: dict[str, Any]
    """The autoscaler's own config."""
    hosts: dict[str, int]
    """Nodes of a replica, for groups that have more than one."""

    @property
    def resources(self) -> dict[str, Needs]:
        """What a node of each worker group has."""
        types = self.config["available_node_types"]
        return {
            name: kind["resources"]
            for name, kind in types.items()
            if name != self.config["head_node_type"]
        }

    def nodes_for(self, request: Request) -> dict[str, int] | None:
        """How many nodes of which group Ray would start; None where it never has room."""
        from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
        from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
        from ray.autoscaler.v2.utils import ResourceRequestUtil
        from ray.core.generated.autoscaler_pb2 import GangResourceRequest

        config = AutoscalingConfig(copy.deepcopy(self.config), skip_content_hash=True)
        one = GangResourceRequest(requests=[ResourceRequestUtil.make(b) for b in request.bundles])
        reply = ResourceDemandScheduler().schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=config.get_node_type_configs(),
                max_num_nodes=config.get_max_num_nodes(),
                gang_resource_requests=[one] * request.count,
            )
        )
        if reply.infeasible_gang_resource_requests:
            return None
        return {launch.instance_type: launch.count for launch in reply.to_launch}


def node_types(found: RayObject, cluster: Cluster) -> NodeTypes:
    """The node types of an object's cluster.

    Raises:
        ValueError: Ray cannot read its resources.
    """
    from ray.autoscaler._private.kuberay import autoscaling_config

    logging.getLogger("ray").setLevel(logging.ERROR)
    spec: Any = found.manifest.body
    for key in found.at.split("."):
        spec = spec[key]
    metadata = {"name": found.manifest.name, "namespace": "any"}
    resource = {"metadata": metadata, "spec": {"workerGroupSpecs": []} | spec}
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(copy.deepcopy(resource))
    hosts = {g.group_name: g.num_of_hosts for g in cluster.worker_group_specs if g.num_of_hosts > 1}
    return NodeTypes(config, hosts)


def launcher_node_types(body: dict[str, Any]) -> NodeTypes:
    """Those of a file of Ray's cluster launcher.

    Raises:
        ValueError: the launcher would refuse the file.
    """
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        config = fillout_defaults(copy.deepcopy(body))
        validate_config(config)
    except ValidationError as error:
        raise ValueError(error.message) from None
    except RuntimeError as error:  # a field is missing
        raise ValueError(str(error)) from None
    return NodeTypes(config, {})


def misfit(types: NodeTypes, request: Request) -> tuple[str, str] | None:
    """(rule, what is wrong) where the cluster has no room for a request."""
    if types.nodes_for(request) is None:
        return "no-room", _no_room(types, request)
    return _apart(types, request) if request.parts > 1 else None


def _no_room(types: NodeTypes, request: Request) -> str:
    for bundle in request.bundles:
        if types.nodes_for(Request(request.what, (bundle,))) is None:
            has = "; ".join(f"{n} has {_words(r)}" for n, r in types.resources.items())
            return f"asks for {_words(bundle)} on one node, and no group has it: {has}"
    bundles = len(request.bundles) * request.count
    return (
        f"asks for {bundles} times {_words(request.bundles[-1])} at the same time, more than the "
        f"groups may have; raise their maxReplicas, or ask for less"
    )


def _apart(types: NodeTypes, request: Request) -> tuple[str, str] | None:
    """Parts of an engine exchange activations all the time: they need one node, or one replica."""
    part, parts = request.bundles[-1], request.parts
    room = {
        name: types.hosts.get(name, 1) * _times(has, part) for name, has in types.resources.items()
    }
    room = {name: n for name, n in room.items() if n}
    if max(room.values()) < parts:
        name = max(room, key=room.__getitem__)
        hosts = -(-parts // _times(types.resources[name], part))
        return "parts-apart", (
            f"its {parts} parts (tensor_parallel x pipeline_parallel) do not fit one replica of "
            f"any group; {name} has room for {room[name]}: set its numOfHosts to {hosts}"
        )
    fitting = {name: n for name, n in room.items() if n >= parts}
    if all(name in types.hosts and n % parts for name, n in fitting.items()):
        name, n = min(fitting.items(), key=lambda item: item[1])
        return "parts-left-over", (
            f"its {parts} parts leave {n % parts} of {n} places idle in each replica of {name}; "
            f"set numOfHosts to {-(-parts // _times(types.resources[name], part))}"
        )
    return None


def _times(has: Needs, part: Needs) -> int:
    """How many of a part a node has room for."""
    return min(int(has.get(name, 0) / n) for name, n in part.items()) if part else 0


def _words(needs: Needs) -> str:
    shown = {name: n for name, n in needs.items() if name != "memory"}
    return ", ".join(f"{n:g} {name}" for name, n in shown.items()) or "nothing"
