"""Whether a Ray cluster has room for a request, by Ray's own KubeRay code and autoscaler.

Ray derives the autoscaler's node types from the RayCluster, and its scheduler decides which nodes
it would start for a request on an empty cluster. This is private code of the pinned Ray version.
"""

import copy
import difflib
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from wrpo_ray.kubernetes.ray_objects import Cluster, RayObject
from wrpo_ray.kubernetes.resource_requests import Needs, Request

HEAD = "headgroup"
SIMULATED = 64
"""The most bundles of equal requests that Ray's scheduler is given."""
RUNNING = 8
"""The most nodes of a group that are there before a request, whatever its `minReplicas`."""


@dataclass(frozen=True)
class NodeTypes:
    """The node types that an autoscaler may start."""

    config: dict[str, Any]
    """The autoscaler's own config."""
    hosts: dict[str, int]
    """Nodes per replica, for groups with more than one."""
    found: dict[str, dict[str, int] | None] = field(default_factory=dict)
    """The nodes of each request that was asked for."""

    @property
    def resources(self) -> dict[str, Needs]:
        """The resources of a node of each worker group."""
        types = self.config["available_node_types"]
        return {
            name: kind["resources"]
            for name, kind in types.items()
            if name != self.config["head_node_type"]
        }

    def nodes_for(self, request: Request) -> dict[str, int] | None:
        """Return the nodes of each group that Ray would start; None if there is never room.

        Ray's scheduler takes a time that rises with the square of the number of nodes, so more
        than `SIMULATED` equal requests are counted by those that fill nodes together.
        """
        key = repr((request.bundles, request.count, request.selector))
        if key not in self.found:
            one = _divided(request)
            small = one.count <= max(1, SIMULATED // len(one.bundles))
            self.found[key] = _scheduled(self.config, one) if small else _counted(self.config, one)
        return self.found[key]


def _divided(request: Request) -> Request:
    """Return many equal bundles of one training run as requests of one bundle each."""
    bundles = request.bundles
    if request.count > 1 or len(bundles) <= SIMULATED or any(b != bundles[0] for b in bundles):
        return request
    return replace(request, bundles=bundles[:1], count=len(bundles))


def _counted(config: dict[str, Any], request: Request) -> dict[str, int] | None:
    """Return the nodes of many equal requests; None if there is no room."""
    left, total, rest = request.count, Counter[str](), copy.deepcopy(config)
    most = max(1, SIMULATED // len(request.bundles))
    least = {name: kind.get("min_workers", 0) for name, kind in _types(rest).items()}
    for kind in _types(rest).values():
        kind["min_workers"] = 0
    while left:
        many, used = _unit(rest, replace(request, count=min(left, most)))
        if not used:
            return None
        rooms = [_types(rest)[name]["max_workers"] // n for name, n in used.items()]
        times = max(1, min(left // many, rest["max_workers"] // sum(used.values()), *rooms))
        for name, number in used.items():
            total[name] += times * number
            _types(rest)[name]["max_workers"] -= times * number
            rest["max_workers"] -= times * number
        left -= times * many
    return {name: max(total[name], n) for name, n in least.items() if total[name] or n}


def _unit(config: dict[str, Any], request: Request) -> tuple[int, dict[str, int]]:
    """Return the most requests that fit the nodes which the first one needs, and these nodes."""
    used = _scheduled(config, replace(request, count=1)) or {}
    low, high = 1, request.count
    while low < high:
        middle = (low + high + 1) // 2
        is_same = _scheduled(config, replace(request, count=middle)) == used
        low, high = (middle, high) if is_same else (low, middle - 1)
    return low, used


def _types(config: dict[str, Any]) -> dict[str, Any]:
    types: dict[str, Any] = config["available_node_types"]
    return types


def _scheduled(given: dict[str, Any], request: Request) -> dict[str, int] | None:
    """Return the nodes that Ray's scheduler would start; None if there is no room."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest
    from ray.core.generated.common_pb2 import LABEL_OPERATOR_NOT_IN as NOT_IN

    own = copy.deepcopy(given)
    least = {name: kind.get("min_workers", 0) for name, kind in _types(own).items()}
    for kind in _types(own).values():
        kind["min_workers"] = min(kind.get("min_workers", 0), RUNNING)
    config = AutoscalingConfig(own, skip_content_hash=True)
    labels = [[(k, NOT_IN, [v.removeprefix("!")]) for k, v in request.selector.items()]]
    made = [ResourceRequestUtil.make(b, label_selectors=labels) for b in request.bundles]
    one = GangResourceRequest(requests=made)
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
    counts = {launch.instance_type: launch.count for launch in reply.to_launch}
    return {name: max(n, least.get(name, 0)) for name, n in counts.items()}


def node_types(found: RayObject, cluster: Cluster) -> NodeTypes:
    """Return the node types of an object's cluster.

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
    """Return the node types of a file of Ray's cluster launcher.

    Raises:
        ValueError: the launcher would reject the file.
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
    """Return (rule, problem) if the cluster has no room for a request."""
    if types.nodes_for(request) is None:
        return "no-room", _no_room(types, request)
    return _apart(types, request) if request.parts > 1 else None


def _no_room(types: NodeTypes, request: Request) -> str:
    for bundle in request.bundles:
        if types.nodes_for(replace(request, bundles=(bundle,), count=1)) is None:
            if unknown := _unknown(types, bundle):
                return unknown
            if group := _elsewhere(types, request):
                wanted = _resources_text(bundle)
                return f"asks for {wanted} on one node; {_move(types, request, group)}"
            has = "; ".join(f"{n} has {_resources_text(r)}" for n, r in types.resources.items())
            node = " without the label ".join(["one node", *request.selector])
            return f"asks for {_resources_text(bundle)} on {node}, and no group has it: {has}"
    bundles = len(request.bundles) * request.count
    return (
        f"asks for {bundles} times {_resources_text(request.bundles[-1])} at the same time, more "
        f"than the groups may have; raise their maxReplicas, or ask for less"
    )


def _unknown(types: NodeTypes, bundle: Needs) -> str | None:
    """Explain a custom resource that no group has, such as a mistyped name of a group."""
    known = {name for has in types.resources.values() for name in has}
    for name in sorted(set(bundle) - known - {"CPU", "GPU", "memory"}):
        own = sorted(known - {"CPU", "GPU", "memory"})
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"they have {', '.join(own) or 'none'}"
        return f"asks for the resource {name!r}, which no group has; {hint}"
    return None


def _elsewhere(types: NodeTypes, request: Request) -> str | None:
    """Return the smallest group that would have room, if the request named it; None if none has."""
    own = _groups_of(types, request)
    sizes = {name: (has.get("GPU", 0), has.get("CPU", 0)) for name, has in types.resources.items()}
    for group in sorted(sizes, key=sizes.__getitem__):
        if not own or group in own or group not in types.resources[group]:
            continue
        moved = [{group if n in own else n: many for n, many in b.items()} for b in request.bundles]
        there = replace(request, bundles=tuple(moved))
        is_whole = request.parts == 1 or max(_room(types, there).values(), default=0) >= there.parts
        if is_whole and types.nodes_for(there) is not None:
            return group
    return None


def _groups_of(types: NodeTypes, request: Request) -> set[str]:
    """Return the groups that a request names by their resource."""
    return {name for bundle in request.bundles for name in bundle if name in types.resources}


def _move(types: NodeTypes, request: Request, group: str) -> str:
    own = ", ".join(sorted(_groups_of(types, request)))
    return f"{group} has room: name it in `resources` in place of {own}"


def _room(types: NodeTypes, request: Request) -> dict[str, int]:
    """Return how many parts of an engine a replica of each group has room for, if for any."""
    part = request.bundles[-1]
    room = {n: types.hosts.get(n, 1) * _times(has, part) for n, has in types.resources.items()}
    return {name: n for name, n in room.items() if n}


def _apart(types: NodeTypes, request: Request) -> tuple[str, str] | None:
    """Check that all parts of an engine fit one node or replica: they exchange activations."""
    part, parts = request.bundles[-1], request.parts
    room = _room(types, request)
    if max(room.values()) < parts:
        name = max(room, key=room.__getitem__)
        hosts = -(-parts // _times(types.resources[name], part))
        text = f"its {parts} parts (tensor_parallel x pipeline_parallel) do not fit one replica of "
        if group := _elsewhere(types, request):
            return "parts-apart", f"{text}{name}; {_move(types, request, group)}"
        return "parts-apart", (
            f"{text}any group; {name} has room for {room[name]}: set its numOfHosts to {hosts}"
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
    """Return how many of a part fit a node."""
    return min(int(has.get(name, 0) / n) for name, n in part.items()) if part else 0


def _resources_text(needs: Needs) -> str:
    shown = {name: n for name, n in needs.items() if name != "memory"}
    return ", ".join(f"{n:g} {name}" for name, n in shown.items()) or "nothing"
