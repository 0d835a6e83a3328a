"""Each field of a manifest with values of other types and forms: told in a line, never a crash."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.manifests import CLUSTER, Body, ray_objects
from support.request_values import path_text, places, replaced

from wrpo_ray import cli
from wrpo_ray.kubernetes import formats
from wrpo_ray.kubernetes.check import check, check_objects
from wrpo_ray.kubernetes.formats import Format
from wrpo_ray.kubernetes.manifests import Manifest, Problem, read

OTHERS = (
    "base/network.yaml", "storage/storage.yaml", "base/accounts.yaml", "base/namespace.yaml",
    "queue/queue.yaml", "overlays/serve-redis/redis.yaml", "dashboards/podmonitors.yaml",
    "secrets.example.yaml", "launcher.yaml",
)  # fmt: skip
GROUPS = ("cpu", "generate-1gpu", "serve")
WRONG_TYPES: tuple[Any, ...] = (True, 7, "16GB", [[]], {"a": {"b": []}})
ODD: tuple[Any, ...] = (None, -1, 10**30, "\ud800\n")
FREE = {
    "description",  # of a priority class; a label to people
    "InstanceType",  # of a cloud, in a launcher's file
    "run_options[]",
    "upscaling_speed",
}
"""What is passed over: the ends of paths whose types are nobody's here."""


def shipped() -> list[Body]:
    """Every object that is shipped; Ray's with few groups, as the others have the same fields."""
    found = list(ray_objects().values())
    for body in found:
        spec = body["spec"]
        spec = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        groups = spec["workerGroupSpecs"]
        spec["workerGroupSpecs"] = [g for g in groups if g["groupName"] in GROUPS]
    manifests, unread = read([str(CLUSTER / name) for name in OTHERS])
    assert not unread
    return found + [manifest.body for manifest in manifests]


def unlike(bodies: list[Body], keys: int = 2) -> Iterator[tuple[Body, tuple[int | str, ...]]]:
    """Places in objects, each end of so many keys once: a pod has the same fields everywhere."""
    seen = set()
    for body in bodies:
        for place in places(body):
            ends = ["[]" if isinstance(key, int) else key for key in place[-keys:]]
            shape = (body.get("kind") if len(place) < 3 else "", *ends)
            if shape not in seen:
                seen.add(shape)
                yield body, place


def told(body: Body) -> list[Problem]:
    """The problems of one object, each of them a line."""
    found = check_objects([Manifest("file.yaml", body)]).problems
    for problem in found:
        line = str(problem)
        assert line.isprintable()
        assert line.startswith("file.yaml: ")
        assert len(line) < 1500
        line.encode()
    return found


def is_near(problem: Problem, place: tuple[int | str, ...]) -> bool:
    """Whether a problem is told of a field, of one below it or of one that holds it."""
    field, here = (re.sub(r"\[[^\]]*\]", "", path) for path in (problem.field, path_text(place)))
    return field.startswith(here) or here.startswith(field)


def test_what_is_shipped_has_no_problem():
    found = [problem for body in shipped() for problem in told(body)]
    assert {problem.rule for problem in found} == {"placeholder"}  # of secrets.example.yaml


def test_a_value_of_another_type_in_any_field_is_told_with_its_field():
    tried, passed, far = 0, {}, []
    for body, place in unlike(shipped()):
        old: Any = body
        for key in place:
            old = old[key]
        end = f"{place[-2]}[]" if isinstance(place[-1], int) else place[-1]
        for value in WRONG_TYPES:
            if type(value) is type(old) or end in FREE:
                continue
            tried += 1
            found = told(replaced(body, place, value))
            if not found:
                passed.setdefault(f"{body.get('kind')} {path_text(place)}", []).append(value)
            elif not any(is_near(problem, place) for problem in found):
                far.append((path_text(place), value, list(map(str, found))))
    assert tried > 1000
    # A quantity may be a number, and a port the number of one.
    numbers = r"(limits|requests)\..*|sizeLimit|nominalQuota|tcpSocket\.port"
    passed = {place: v for place, v in passed.items() if v != [7] or not re.search(numbers, place)}
    assert (passed, far) == ({}, [])


def test_odd_values_in_any_field_are_told_in_a_line_or_taken():
    tried = 0
    for body, place in unlike(shipped(), keys=1):
        for value in ODD:
            told(replaced(body, place, value))
            tried += 1
    assert tried > 600


def test_any_number_of_mistakes_at_once_is_told():
    """Each of all fields of an object wrong, one after another on top of those before."""
    for body in shipped():
        broken = copy.deepcopy(body)
        for place in reversed([p for p in places(body) if p not in (("kind",), ("apiVersion",))]):
            broken = replaced(broken, place, [[]])
            if len(place) > 2 and place[-1] != 0:
                continue
            told(broken)


TEXTS = {
    ("RayJob", "runtimeEnvYAML"): "env_vars: {A: b}\npip: [a]\nworking_dir: s3://a/b.zip\n",
    ("RayService", "serveConfigV2"): None,
}
"""Fields that hold YAML; null is the shipped text."""


@pytest.mark.parametrize(("kind", "field"), TEXTS)
def test_yaml_inside_a_field_is_told_in_a_line_or_taken(kind: str, field: str):
    (body,) = (b for b in shipped() if b.get("kind") == kind)
    whole = yaml.safe_load(TEXTS[kind, field] or body["spec"][field])
    texts = ["[", "- 1", "7", "null", "a: &x {b: *x}", "2001-99-99", "{1: 2}", "[" * 5000, "\x00"]
    for place in places(whole):
        texts += [yaml.safe_dump(replaced(whole, place, v)) for v in (True, [[]], None, "a")]
    for text in texts:
        body["spec"][field] = text
        assert all(p.field.startswith(f"spec.{field}") or not p.field for p in told(body)), text


# --- files -----------------------------------------------------------------------------------

GOOD = json.dumps({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}})
FILES = {
    "": "has no object",
    "---\n---\n": "has no object",
    GOOD: None,
    "\ufeff" + GOOD: None,
    "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, annotations: {day: 2001-99-99}}": None,
    "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, annotations: {day: 2001-01-01}}": None,
    "a: &x {b: *x}": "Circular",
    "a: &x [*x]": "Circular",
    "[" * 3000: "",
    "{a: " * 3000 + "1" + "}" * 3000: "nested too deeply",
    "1: 2": "the key 1 is no text",
    "kind: {yes: 2}": "the key True under 'kind' is no text",
    "a: [{null: 2}]": "the key None under 'a' is no text",
    "? [a]\n: b": "unhashable",
    "a: !!python/object:os.system {}": "could not determine a constructor",
    "a: !!binary 8J+": "",
    "a: !!int x": "",
    "a: " + "9" * 5000: "",
    "a: \x00": "",
    "a:\tb: c": "",
    "- 1": "holds a list",
    "7": "holds a int",
    "text": "holds a str",
    "kind: List\nitems: [1, {1: 2}]": "holds a int",
}


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_file_of_any_content_is_told_in_a_line(text: str, tmp_path: Path):
    file = tmp_path / "file.yaml"
    file.write_text(text, encoding="utf-8")
    found = [str(problem) for problem in check([str(file)]).problems]
    assert all(line.isprintable() and str(file) in line for line in found)
    assert bool(found) == (FILES[text] is not None)
    assert not found or FILES[text] in found[0]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("memory: 16GB", "is '16GB', which is no quantity of Kubernetes; write 16Gi (or 16G)"),
        ("memory: 16 Gi", "is '16 Gi', which is no quantity of Kubernetes; write a number with"),
        ("memory: [16Gi]", "is ['16Gi'], a list; it has to be a quantity, such as 2, 500m or 16Gi"),
        ("memory: yes", "is True, a boolean; it has to be a quantity"),
        ("nvidia.com/gpu: 0.5", "is 0.5; it has to be a whole number"),
        ("a b: 1", "the key is 'a b'; it has to be letters, digits"),
    ],
)
def test_a_quantity_is_told_in_one_line_by_the_command(
    given: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    body = ray_objects()["RayCluster"]
    container = body["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["resources"]["limits"] |= yaml.safe_load(given)
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(body))
    assert cli.main(["cluster", "check", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    key = given.partition(":")[0]
    place = f"spec.workerGroupSpecs[0].template.spec.containers[0].resources.limits.{key}"
    assert line.startswith(f"wrpo: error: {file}: RayCluster/wrpo: {place}: {reason}")


POD = {"containers": [{"name": "a", "image": "i", "ports": [{"name": "http"}]}]}
OBJECTS: dict[str, Body] = {
    "v1 Service": {"spec": {"ports": [{"name": "http", "port": 80}]}},
    "v1 Pod": {"spec": POD | {"tolerations": [{"key": "a", "operator": "Exists"}]}},
    "v1 PersistentVolumeClaim": {"spec": {}},
    "v1 PersistentVolume": {"spec": {"csi": {"driver": "d", "volumeAttributes": {}}}},
    "v1 LimitRange": {"spec": {"limits": [{"type": "Container"}]}},
    "v1 ConfigMap": {"data": {}, "binaryData": {}},
    "v1 Secret": {"data": {}, "stringData": {}},
    "monitoring.coreos.com/v1 PrometheusRule": {"spec": {}},
    "example.com/v1 Thing": {"spec": {}},
    **{
        f"rbac.authorization.k8s.io/v1 {kind}": {}
        for kind in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
    },
}
KEYS = ("secretName", "labels", "kind", "replicas", "image", "metadata", "env", "optional", "name")
FREE_TEXTS = dict.fromkeys(KEYS, "Any text, /of/ any kind")
PORTS_NAME, POD_PORTS_NAME = "spec.ports.0.name", "spec.containers.0.ports.0.name"
RULES = [{"alert": "A", "labels": {"a b": "page me"}, "annotations": {"a b": 1}}]
EDITS: list[tuple[str, str, list[Any], list[Any]]] = [
    # object, field, what Kubernetes takes, what it refuses
    ("v1 Service", PORTS_NAME, ["dashboard-agent-listen", "8a", "a--b"], ["A", "a" * 64, "a.b"]),
    ("v1 Pod", POD_PORTS_NAME, ["agent-listen"], ["dashboard-agent-listen", "a--b", "80"]),
    ("v1 Pod", "spec.serviceAccountName", ["", "a.b"], ["A", " ", 7]),
    ("v1 Pod", "spec.priorityClassName", ["", "a"], ["A", 7]),
    ("v1 Pod", "spec.dnsConfig", [{"options": [{"name": "ndots", "value": "2"}]}], []),
    ("v1 Pod", "spec.volumes", [[]], [[{"name": "a", "secret": {"secretName": ""}}]]),
    ("v1 Pod", "spec.tolerations.0.key", ["", None, "a/b"], ["a b", 7]),
    (
        "v1 Pod",
        "spec.tolerations.0",
        [{"operator": "Exists"}, {"key": "a", "value": "b"}],
        [{"key": "", "operator": "Equal"}, {"key": ""}, {"effect": "NoSchedule"}, "a"],
    ),
    ("v1 PersistentVolumeClaim", "spec.storageClassName", ["", "a"], ["A", 7]),
    ("v1 PersistentVolume", "spec.csi.volumeAttributes", [FREE_TEXTS, {}], [{"a": 1}, "a"]),
    ("v1 PersistentVolume", "metadata.annotations", [FREE_TEXTS], [{"a": 1}]),
    ("v1 LimitRange", "spec.limits", [[{"type": "Pod", "max": {"cpu": 1}}]], [{}, ["a"]]),
    ("v1 ConfigMap", "data", [FREE_TEXTS], [{"a": 1}]),
    ("v1 ConfigMap", "binaryData", [FREE_TEXTS], [{"a": 1}]),
    ("v1 Secret", "stringData", [FREE_TEXTS], [{"a": 1}]),
    ("monitoring.coreos.com/v1 PrometheusRule", "spec.groups", [[{"rules": RULES}]], []),
    ("example.com/v1 Thing", "spec", [FREE_TEXTS, {"labels": [7], "metadata": 7}], []),
    ("example.com/v1 Thing", "metadata.labels", [{"a": "b"}], [{"a": "b c"}, {"a b": "c"}, 7]),
    *(
        (name, "metadata.name", ["wrpo:reader", "A b"], ["a/b", "a%b", ".", "..", 7])
        for name in OBJECTS
        if name.startswith("rbac")
    ),
]


@pytest.mark.parametrize(("name", "field", "good", "bad"), EDITS, ids=lambda v: str(v)[:40])
def test_an_object_takes_what_kubernetes_takes(
    name: str, field: str, good: list[Any], bad: list[Any]
):
    version, _, kind = name.partition(" ")
    body = copy.deepcopy(OBJECTS[name]) | {"apiVersion": version, "kind": kind}
    elsewhere = {"wrpo-ray/external": "ServiceAccount/a.b"}
    body["metadata"] = {"name": "a", "annotations": elsewhere}
    holder: Any = body
    *above, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    for key in above:
        holder = holder[key]
    for value in good + bad:
        holder[last] = value
        assert bool(told(body)) == (value in bad), value


# --- the grammar -----------------------------------------------------------------------------

LONG = "a" * 63
VALUES: dict[str, tuple[Format, list[Any], list[Any]]] = {
    # form: what it takes, what it refuses
    "quantity": (
        formats.QUANTITY,
        [0, 1, 1.5, "0", "1", "0.5", ".5", "5.", "+1", "500m", "100u", "7n", "1k", "1M", "1G", "1T",
         "1P", "1E", "1Ki", "1Mi", "1.5Gi", "1Ti", "1Pi", "1Ei", "1e3", "1E3", "1e-3", "12e6"],
        ["", " ", "16GB", "16gb", "16 Gi", "16gi", "16K", "1kB", "1Gib", "1m5", "0x10", "1e", "e3",
         "1e999999999", "1_000", "1,5", "١", "many", "-1", "-1Gi", -1, -0.5, True, None, [], {},
         10**30, float("nan"), float("inf"), "9" * 31, "1\n", "Gi", "."],
    ),
    "device": (formats.WHOLE_QUANTITY, [0, 8, "8", "1k", "1.0"], ["500m", 0.5, "0.5", "1e-3", "x"]),
    "label": (
        formats.LABEL_VALUE,
        ["", "a", "A", "1", "a_b.c-d", LONG],
        ["a b", "-a", "a-", ".a", "é", "a/b", LONG + "a", "a\n", True, 1, None, []],
    ),
    "key": (
        formats.KEY,
        ["a", "a.b_c-D", "a/b", "x.y.z/b", f"{'a.' * 126}a/{LONG}"],
        ["", "a/", "/a", "a/b/c", "A/b", "a b", f"{'a.' * 127}a/b", LONG + "a", 1, "a_/b"],
    ),
    "name": (
        formats.DNS_LABEL,
        ["a", "1", "a-1", LONG],
        ["", "A", "a.b", "-a", "a-", "a_b", "é", 1, LONG + "a"],
    ),
    "service": (formats.DNS_1035, ["a", "a-1"], ["1", "1a", "A", "a.b", ""]),
    "subdomain": (
        formats.SUBDOMAIN,
        ["a", "1.2", "a-b.c"],
        ["", "a..b", ".a", "a.", "A", "a_b", "a" * 254, 7],
    ),
    "variable": (
        formats.ENV_NAME, ["A", "_", "a.b-c", "A1"], ["", "1A", "A=B", "A B", "é", 1, None]
    ),
    "data": (formats.DATA_KEY, ["a", ".A_b-1"], ["", "a/b", "a b", 1]),
    "port name": (
        formats.PORT_NAME,
        ["a", "http", "a-1", "1a", "x" * 15],
        ["", "1", "123", "a--b", "-a", "a-", "A", "a_b", "x" * 16, 80],
    ),
    "port": (formats.PORT, [1, 65535, "http"], [0, -1, 65536, "80", True, 80.0, None, ""]),
    "port of Ray": (formats.PORT_TEXT, ["0", "6379"], [6379, "-1", "65536", "a", "", "1.5", "٣"]),
    "bytes": (formats.BYTES, ["0", "1000"], ["1Gi", "1e9", "1.5", "", 5, "9" * 19, "9" * 20]),
    "count": (formats.COUNT, ["0", "8"], ["500m", "-1", "1.0", 1, "", "9" * 10]),
    "Go time": (
        formats.GO_TIME, ["30m", "1h30m", "1.5s", "100ms", "90"], ["", "m", "1d", "-1s", "1 m", 30]
    ),
    "Prometheus time": (
        formats.PROMETHEUS_TIME,
        ["0", "30s", "1m30s", "1d"],
        ["", "30", "1.5s", "s", "1s1m", 30, None],
    ),
    "resources": (
        formats.JSON_RESOURCES,
        ["", '{"a": 1}', '{"a": 0.5}', "{}"],
        ["{a: 1}", "[]", "1", '{"a": "1"}', '{"a": -1}', '{"a": true}', "[" * 9999, 7, {"a": 1}],
    ),
    "resources of ray start": (
        formats.QUOTED_RESOURCES,
        ['"{\\"a\\": 1}"', "'{\"a\": 1}'"],
        ['{"a": 1}', '"{\\"a\\": 0.5}"', '"{a: 1}"', '""', "", 7, None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_form_takes_what_kubernetes_takes(name: str):
    form, good, bad = VALUES[name]
    assert not [value for value in good if form.wrong(value)]
    assert not [value for value in bad if not form.wrong(value)]


@given(st.from_regex(formats._QUANTITY, fullmatch=True) | st.text(max_size=6))
def test_what_is_taken_as_a_quantity_is_one_that_ray_reads(text: str):
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    if not formats.QUANTITY.wrong(text):
        assert parse_quantity(text) >= 0


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_no_value_breaks_a_form(value: Any):
    for form, _, _ in VALUES.values():
        text = form.wrong(value)
        assert text is None or len(text) < 500
