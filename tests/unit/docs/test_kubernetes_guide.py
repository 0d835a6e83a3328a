"""The guide to Kubernetes: its commands, tried as far as they go without a cluster."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.doc_blocks import Block, blocks
from support.manifests import CLUSTER, kubectl

from wrpo_ray import cli
from wrpo_ray.kubernetes.check import check
from wrpo_ray.kubernetes.manifests import ADVICE
from wrpo_ray.kubernetes.ray_objects import number_of

PAGE = "docs/guides/kubernetes.md"
SECRETS = CLUSTER / "secrets.example.yaml"
SUBMITTER = "ray-job-submitter"
"""The container that KubeRay adds to the head in SidecarMode (1.7.0, utils/constant.go:356)."""
FILES = {
    "credentials.env": "HF_TOKEN=a\nOPENAI_API_KEY=b\n",
    "store.env": "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\nAWS_DEFAULT_REGION=c\n",
    "keys": "client 0123456789abcdef\n",
}
"""What the reader has beside `mine/`."""


@cache
def page() -> tuple[Block, ...]:
    return tuple(blocks(PAGE))


def lines() -> Iterator[str]:
    """Each line of a command, joined where it is continued."""
    for block in page():
        if block.language == "sh":
            yield from block.text.replace("\\\n", " ").splitlines()


def commands(program: str) -> list[list[str]]:
    found = [words for b in page() if b.language == "sh" for words in b.commands()]
    return [words[1:] for words in found if words[0] == program]


def saved(name: str) -> Any:
    """The content of the file that the reader saves under a name."""
    return yaml.safe_load(next(block.text for block in page() if block.saved_as == name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cluster/, the files that the guide writes, and those of its reader."""
    folder = tmp_path_factory.mktemp("guide")
    shutil.copytree(CLUSTER, folder / "cluster")
    for block in page():
        if block.saved_as:
            file = folder / block.saved_as
            file.parent.mkdir(parents=True, exist_ok=True)
            text = block.text.replace("value: CLASS", "value: efs")
            file.write_text(text.replace("your-bucket", "bucket"))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for line in lines():
        if line.startswith(("cp ", "sed ")):
            subprocess.run(shlex.split(line), cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def applied(place: Path) -> dict[str, list[dict[str, Any]]]:
    """The objects of each folder that the guide applies."""
    found = {}
    for words in commands("kubectl"):
        if words[0] == "apply" and "-k" in words:
            name = words[words.index("-k") + 1]
            done = subprocess.run(
                [kubectl(), "kustomize", name], cwd=place, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            (place / f"{name.replace('/', '-')}.yaml").write_text(done.stdout)
            found[name] = list(yaml.safe_load_all(done.stdout))
    return found


def named(applied: dict[str, list[dict[str, Any]]]) -> set[str]:
    """`kind/name` of all objects, as kubectl spells them, with the Job of a RayJob."""
    short = {"PersistentVolumeClaim": "pvc"}
    bodies = [body for part in applied.values() for body in part]
    names = {f"{short.get(b['kind'], b['kind'].lower())}/{b['metadata']['name']}" for b in bodies}
    submitted = [b for b in bodies if b.get("spec", {}).get("submissionMode") == "K8sJobMode"]
    return names | {f"job/{b['metadata']['name']}" for b in submitted}


def test_only_ones_own_folders_are_applied_and_each_that_is_written_is(
    applied: dict[str, list[dict[str, Any]]],
):
    written = {str(Path(b.saved_as).parent) for b in page() if b.saved_as}
    written -= {"mine", "mine/storage", "mine/limits", "mine/inside"}  # single files, components
    assert set(applied) == written


def test_all_pods_have_the_readers_registry(applied: dict[str, list[dict[str, Any]]]):
    for name, bodies in applied.items():
        images = set(re.findall(r"'image': '([^']+)'", str(bodies)))
        assert all(image.startswith("registry.example.com/") for image in images), name


def test_what_the_guide_writes_passes_the_check(
    place: Path,
    applied: dict[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name in applied:
        found = check([str(place / f"{name.replace('/', '-')}.yaml")])
        assert [str(problem) for problem in found.problems] == []
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", str(Path(kubectl()).parent), prepend=":")
    alone, team = commands("wrpo")
    assert team[2:4] == ["mine/team-a/base", "mine/team-a/job"]
    assert cli.main(team) == 0
    assert "no problem found" in capsys.readouterr().out
    assert cli.main(alone) == 0
    told = capsys.readouterr().out
    (shown,) = (b.text for b in page() if b.language == "text" and "RayJob/fusion" in b.text)
    assert all(line in told for line in shown.splitlines())


def test_strangers_schemas_accept_what_the_guide_writes(
    place: Path, applied: dict[str, list[dict[str, Any]]]
):
    files = [str(place / f"{name.replace('/', '-')}.yaml") for name in applied]
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["mine/serve", "mine/serve-b"])
def test_an_ingress_leads_to_the_service_of_its_model(
    folder: str, applied: dict[str, list[dict[str, Any]]]
):
    (ingress,) = (b for b in applied[folder] if b["kind"] == "Ingress")
    (service,) = (b for b in applied[folder] if b["kind"] == "RayService")
    assert f"'{service['metadata']['name']}-serve-svc'" in str(ingress)
    assert ingress["metadata"]["namespace"] == service["metadata"]["namespace"]


def test_folders_do_not_change_objects_of_each_other(applied: dict[str, list[dict[str, Any]]]):
    """What several folders have, such as the volume, is the same in all of them."""
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    there = {name: bodies for name, bodies in applied.items() if name != "mine/kueue"}  # for `job`
    for name, bodies in there.items():
        for body in bodies:
            meta = body["metadata"]
            key = body["kind"], meta.get("namespace", ""), meta["name"]
            assert seen.setdefault(key, body) == body, f"{key} of {name}"
    names = {(kind, name) for kind, namespace, name in seen if namespace == "wrpo"}
    assert {("RayJob", "fusion"), ("RayJob", "fusion-b")} <= names
    assert {("RayService", "fused"), ("RayService", "other")} <= names
    assert {("Ingress", "fused"), ("Ingress", "other")} <= names
    outputs = {
        yaml.safe_load(body["data"]["fusion.yaml"])["output"]
        for (kind, space, _), body in seen.items()
        if kind == "ConfigMap" and space == "wrpo" and "fusion.yaml" in body["data"]
    }
    assert len(outputs) == 2


WIDE = {"Namespace", "ClusterQueue", "ResourceFlavor", "Topology", "PriorityClass"}
WIDE |= {"WorkloadPriorityClass", "ClusterRole", "ClusterRoleBinding", "PersistentVolume"}
"""Kinds of objects that are the whole cluster's, which only its administrator may write."""


def rendered(place: Path, name: str) -> list[dict[str, Any]]:
    """The objects of a folder of the reader."""
    command = [kubectl(), "kustomize", name]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_a_team_has_a_quota_and_a_run_in_its_namespace(
    applied: dict[str, list[dict[str, Any]]],
):
    base, job = applied["mine/team-a/base"], applied["mine/team-a/job"]
    assert {b["metadata"].get("namespace", "team-a") for b in [*base, *job]} == {"team-a"}
    assert [b["metadata"]["name"] for b in base if b["kind"] == "Namespace"] == ["team-a"]
    assert {"RayJob", "PersistentVolumeClaim"} <= {b["kind"] for b in job}
    (quota,) = (b["spec"]["hard"] for b in base if b["kind"] == "ResourceQuota")
    (whole,) = yaml.safe_load(
        (CLUSTER / "components/quota/quota.yaml").read_text().split("---")[0]
    )["spec"].values()
    changed = {name for name in whole if quota[name] != whole[name]}
    assert set(quota) == set(whole)
    assert {"requests.cpu", "requests.nvidia.com/gpu"} <= changed


@pytest.mark.parametrize("run", ["job", "kueue"])
def test_what_a_team_applies_lacks_only_what_the_administrator_does(place: Path, run: str):
    """Under a name of its own: the team may not write what is the whole cluster's."""
    folder = place / f"mine/team-a/try-{run}"
    folder.mkdir(exist_ok=True)
    team = yaml.safe_load((place / "mine/team-a/job/kustomization.yaml").read_text())
    priorities = "../../../cluster/components/priorities"
    found = {}
    for name, components in {
        "all": [priorities],
        "team": [priorities, *team["components"]],
    }.items():
        parts = {**team, "resources": [f"../../{run}"], "components": components}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(parts))
        found[name] = rendered(place, str(folder.relative_to(place)))
    left = [body for body in found["all"] if body not in found["team"]]
    queue = {"ClusterQueue", "LocalQueue", "ResourceFlavor", "WorkloadPriorityClass"}
    expected = {"Namespace", "PriorityClass"} | (queue if run == "kueue" else set())
    assert {body["kind"] for body in left} == expected
    assert not WIDE & {body["kind"] for body in found["team"]}
    assert all(body in found["all"] for body in found["team"])


def test_the_administrator_s_base_with_kueue_has_the_team_s_queue(place: Path):
    text = (CLUSTER.parent / PAGE).read_text()
    (resources,) = re.findall(r"the administrator's base has `(resources: \[.+?\])`", text)
    folder = place / "mine/team-a/try-base"
    shutil.copytree(place / "mine/team-a/base", folder)
    file = folder / "kustomization.yaml"
    parts = {**yaml.safe_load(file.read_text()), **yaml.safe_load(resources)}
    file.write_text(yaml.safe_dump(parts))
    found = {b["kind"]: b for b in rendered(place, "mine/team-a/try-base")}
    assert found["ClusterQueue"]["metadata"]["name"] == "team-a"
    assert found["LocalQueue"]["spec"]["clusterQueue"] == "team-a"
    selector = found["ClusterQueue"]["spec"]["namespaceSelector"]["matchLabels"]
    assert selector == {"kubernetes.io/metadata.name": "team-a"}


def test_a_team_may_change_nothing_outside_of_its_namespace(
    applied: dict[str, list[dict[str, Any]]],
):
    base = applied["mine/team-a/base"]
    assert not [b for b in base if b["kind"].startswith("ClusterRole")]
    (role,) = (b for b in base if b["kind"] == "Role")
    given = {kind: rule["verbs"] for rule in role["rules"] for kind in rule["resources"]}
    assert {"create", "delete"} <= set(given["rayjobs"])
    assert set(given["localqueues"]) == {"get", "list", "watch"}
    assert "*" not in str(role["rules"])
    bound = [b for b in base if b["kind"] == "RoleBinding"]
    assert {b["roleRef"]["name"] for b in bound} == {role["metadata"]["name"], "edit"}
    assert {s["name"] for b in bound for s in b["subjects"]} == {"team-a"}


def test_every_folder_is_made_before_it_is_written_to():
    made = {w for words in commands("mkdir") for w in words if not w.startswith("-")}
    written = {str(Path(b.saved_as).parent) for b in page() if b.saved_as}
    assert written - {"mine"} == made
    ignored = (CLUSTER.parent / ".gitignore").read_text().splitlines()
    assert "/mine/" in ignored


def test_every_model_of_the_run_is_downloaded():
    (listed,) = (b.text for b in page() if b.saved_as == "mine/models/models.txt")
    rows = [line.split() for line in listed.splitlines()]
    assert all(len(row) == 3 for row in rows)
    run = str(saved("mine/job/fusion.yaml"))
    assert {row[0] for row in rows} == set(re.findall(r"/cache/models/([\w.-]+)", run))


def test_fewer_nodes_are_those_of_the_groups_that_the_guide_names(place: Path):
    folder = place / "bounded"
    folder.mkdir()
    parts = {"resources": ["../mine/job"], "components": ["../mine/limits"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (job,) = (b for b in yaml.safe_load_all(done.stdout) if b["kind"] == "RayJob")
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    bounds = {group["groupName"]: group["maxReplicas"] for group in groups}
    assert bounds["generate-1gpu"] == 24
    assert bounds["train"] == 1


def test_the_shared_volume_has_a_class_that_the_guide_makes(
    applied: dict[str, list[dict[str, Any]]], tmp_path: Path
):
    """`CLASS` stands for one of those; as it stands, Kubernetes and the check refuse the name."""
    text = (CLUSTER.parent / PAGE).read_text()
    (told,) = re.findall(r"For `CLASS` write (.+):", text)
    offered = set(re.findall(r"`([a-z-]+)`", told))
    files = [words[words.index("-f") + 1] for words in commands("kubectl") if "-f" in words]
    made = {saved(file)["metadata"]["name"] for file in files}
    assert offered == made | {"standard-rwx"}
    claims = [b for part in applied.values() for b in part if b["kind"] == "PersistentVolumeClaim"]
    shared = [c for c in claims if c["spec"]["accessModes"] == ["ReadWriteMany"]]
    assert {c["spec"]["storageClassName"] for c in shared} == {"efs"} <= made
    forgotten = tmp_path / "claim.yaml"
    forgotten.write_text(yaml.safe_dump(shared[0]).replace(" efs", " CLASS"))
    (problem,) = check([str(forgotten)], None).problems
    assert "storageClassName" in str(problem)


def test_claims_without_a_class_get_the_default_of_the_cluster():
    addons = {addon["name"]: addon for addon in saved("mine/eks.yaml")["addons"]}
    values = json.loads(addons["aws-ebs-csi-driver"]["configurationValues"])
    assert values == {"defaultStorageClass": {"enabled": True}}
    default = "storageclass.kubernetes.io/is-default-class"
    assert saved("mine/nfs.yaml")["metadata"]["annotations"] == {default: "true"}
    user = saved("mine/efs.yaml")["parameters"]
    spec = yaml.safe_load((CLUSTER / "raycluster" / "cluster.yaml").read_text())["spec"]
    context = spec["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert (user["uid"], user["gid"]) == (str(context["runAsUser"]), str(context["runAsGroup"]))


def test_the_demo_says_how_the_operator_was_installed_and_gets_no_advice(
    place: Path, applied: dict[str, list[dict[str, Any]]]
):
    (variable,) = saved("mine/operator.yaml")["env"]
    (job,) = (b for b in applied["mine/demo"] if b["kind"] == "RayJob")
    declared = job["metadata"]["annotations"]["wrpo-ray/operator-env"]
    assert declared == f"{variable['name']}={variable['value']}"
    assert f"`wrpo-ray/operator-env: {declared}`" in (CLUSTER.parent / PAGE).read_text()
    assert check([str(place / "mine-demo.yaml")], None).advice == []
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    (together,) = worker["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert together["topologyKey"] == "kubernetes.io/hostname"  # its volume is on one node


def test_the_pod_identity_of_the_autoscaler_is_that_of_its_account():
    (bound,) = saved("mine/eks.yaml")["iam"]["podIdentityAssociations"]
    (install,) = (words for words in commands("helm") if "autoscaler/cluster-autoscaler" in words)
    assert install[install.index("-n") + 1] == bound["namespace"]
    assert f"rbac.serviceAccount.name={bound['serviceAccountName']}" in install
    assert "eks-pod-identity-agent" in str(saved("mine/eks.yaml")["addons"])


def test_kueue_has_the_gates_that_the_overlay_and_its_component_name():
    (install,) = (words for words in commands("helm") if words[:2] == ["install", "kueue"])
    gates = saved(install[install.index("-f") + 1])["controllerManager"]["featureGates"]
    on = {gate["name"] for gate in gates if gate["enabled"]}
    tops = [CLUSTER / "overlays/kueue", *(CLUSTER / "components").glob("kueue-*")]
    text = "\n".join((folder / "kustomization.yaml").read_text() for folder in tops)
    assert on == set(re.findall(r"\bElasticJobs\w+", text))
    major, minor, patch = map(int, install[install.index("--version") + 1].split("."))
    assert (major, minor, patch) >= (0, 19, 1)


def test_every_secret_is_made_with_the_keys_of_the_example(place: Path):
    made = {}
    for line in lines():
        if not line.startswith("kubectl create secret"):
            continue
        command = f"{kubectl()}{line.removeprefix('kubectl')} --dry-run=client -o yaml"
        done = subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        body = yaml.safe_load(done.stdout)
        assert body["metadata"]["namespace"] == "wrpo"
        assert all(base64.b64decode(value) for value in body["data"].values())
        made[body["metadata"]["name"]] = set(body["data"])
    example = {
        body["metadata"]["name"]: set(body["stringData"])
        for body in yaml.safe_load_all(SECRETS.read_text())
    }
    assert made == example | {"registry": {".dockerconfigjson"}}


@cache
def options_of(verb: str) -> set[str]:
    """Long and short options of a verb of kubectl, with those of every verb."""
    told = [
        subprocess.run([kubectl(), *words], capture_output=True, text=True, check=True).stdout
        for words in ([verb, "--help"], ["options"])
    ]
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", "\n".join(told)))


def test_kubectl_has_the_verbs_and_options():
    tried = commands("kubectl")
    assert len(tried) > 25
    for words in tried:
        verb = words[0]
        if verb == "create":
            words = words[3:]
            known = {"-n", "--docker-server", "--docker-username", "--docker-password"}
            known |= {"--from-env-file", "--from-file", "--from-literal"}
        else:
            known = options_of(verb)
        given = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
        assert given <= known | {"-"}, words


def test_objects_that_are_waited_for_are_among_the_applied(
    applied: dict[str, list[dict[str, Any]]],
):
    there = named(applied) | {"deployment/kuberay-operator", "service/wrpo-head-svc"}
    there |= {"deployment/kueue-controller-manager"}
    asked = [words for words in commands("kubectl") if words[0] not in ("apply", "create", "label")]
    names = {w for words in asked for w in words[1:] if re.fullmatch(r"[a-z]+/[a-z-]+", w)}
    assert len(names) > 6
    assert names <= there
    job = next(b for b in applied["mine/job"] if b["kind"] == "RayJob")
    (follow,) = (words for words in commands("kubectl") if words[0] == "logs" and "-l" in words)
    key, _, value = follow[follow.index("-l") + 1].partition("=")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert head["metadata"]["labels"][key] == value
    assert job["spec"]["submissionMode"] == "SidecarMode"
    assert follow[follow.index("-c") + 1] == SUBMITTER


def test_a_log_is_asked_for_after_its_pod_was_waited_for():
    seen: set[str] = set()
    for words in commands("kubectl"):
        if words[0] == "wait":
            seen.add(next(w for w in words if "/" in w and not w.startswith("-")))
        elif words[0] == "logs":
            name = re.search(r"job/(\w+)|cluster=(\w+)", " ".join(words)).group(1, 2)
            assert {f"{kind}/{n}" for n in name for kind in ("job", "rayjob")} & seen


def test_the_operator_is_that_of_the_schemas_and_waits_for_heads():
    (install,) = (words for words in commands("helm") if "kuberay/kuberay-operator" in words)
    (title,) = re.findall(r"It is for KubeRay ([\d.]+)", (CLUSTER.parent / PAGE).read_text())
    assert install[install.index("--version") + 1].startswith(title)
    network = (CLUSTER / "base" / "network.yaml").read_text()
    assert f"kubernetes.io/metadata.name: {install[install.index('-n') + 1]}" in network
    (variable,) = saved(install[install.index("-f") + 1])["env"]
    assert variable["name"] == "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"
    assert int(variable["value"]) > 300


def shapes() -> dict[str, list[float]]:
    """CPUs, GiB of memory, GPUs and GiB of disk of each group's pod."""
    spec = yaml.safe_load((CLUSTER / "raycluster" / "cluster.yaml").read_text())["spec"]
    found = {}
    for group in [{"groupName": "head", **spec["headGroupSpec"]}, *spec["workerGroupSpecs"]]:
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        has = {name: number_of(value) for name, value in asked.items()}
        memory, disk = has["memory"] / 2**30, has["ephemeral-storage"] / 2**30
        found[group["groupName"]] = [has["cpu"], memory, has.get("nvidia.com/gpu", 0), disk]
    return found


def test_the_table_of_shapes_is_that_of_the_groups():
    text = (CLUSTER.parent / PAGE).read_text()
    table = text[text.index("| group |") : text.index("Change them")]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    found = {}
    for names, *numbers, _ in rows:
        for name in re.findall(r"[a-z0-9-]+", names):
            found[name] = [float(re.match(r"\d+", number)[0]) for number in numbers]
    sidecar = 1  # GiB of the autoscaler, beside the head
    found["head"][1] -= sidecar
    assert found == shapes()


def test_pools_that_start_at_zero_tell_the_autoscaler_what_they_have():
    prefix = "k8s.io/cluster-autoscaler/node-template/resources/"
    asked = shapes()
    pools = [p for p in saved("mine/eks.yaml")["managedNodeGroups"] if p["minSize"] == 0]
    assert {pool["name"] for pool in pools} == {"cpu", "gpu"}
    for pool in pools:
        tags = pool["tags"]
        gpus = int(tags.get(f"{prefix}nvidia.com/gpu", 0))
        assert bool(gpus) == ("nvidia.com/gpu" in str(pool.get("taints")))
        disk = number_of(tags[f"{prefix}ephemeral-storage"]) / 2**30
        assert disk < pool["volumeSize"]
        fitting = [s for name, s in asked.items() if name != "head" and bool(s[2]) == bool(gpus)]
        assert fitting
        assert all(shape[2] <= gpus and shape[3] <= disk for shape in fitting)
    gke = [words for words in commands("gcloud") if "node-pools" in words]
    assert len(gke) == 2
    assert all("--min-nodes" in words and "--enable-autoscaling" in words for words in gke)


def test_every_component_is_told():
    text = (CLUSTER.parent / PAGE).read_text()
    told = text[text.index("| component |") : text.index("## 5.")]
    assert {f.name for f in (CLUSTER / "components").iterdir()} == set(
        re.findall(r"`([a-z0-9-]+)`", re.sub(r"\| [^|]+ \|$", "", told, flags=re.M))
    )


def test_the_record_names_tests_and_rules_that_exist():
    record = (CLUSTER.parent / "docs" / "adr" / "0021-operator.md").read_text()
    tests = set(re.findall(r"`(test_\w+)`", record))
    assert len(tests) > 8
    code = "\n".join(file.read_text() for file in (CLUSTER.parent / "tests").rglob("test_*.py"))
    assert all(f"def {name}(" in code for name in tests)
    table = record[record.index("| rule |") : record.index("**A lost head.**")]
    rules = {r for line in table.splitlines()[2:] for r in re.findall(r"`([a-z-]+)`", line[:90])}
    told = "\n".join(f.read_text() for f in (CLUSTER.parent / "wrpo_ray/kubernetes").glob("*.py"))
    assert all(f'"{rule}"' in told for rule in rules)
    assert rules >= ADVICE
