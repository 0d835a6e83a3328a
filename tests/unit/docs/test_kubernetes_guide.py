"""The guide to Kubernetes: its commands, tried as far as they go without a cluster."""

from __future__ import annotations

import base64
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

from wrpo_ray import cli, config
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
            file.write_text(block.text.replace("your-bucket", "bucket"))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for line in lines():
        if line.startswith("cp "):
            subprocess.run(shlex.split(line), cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def applied(place: Path) -> dict[str, list[dict[str, Any]]]:
    """The objects of each folder that the guide applies."""
    found = {}
    for words in commands("kubectl"):
        if words[0] == "apply":
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
    written -= {"mine", "mine/storage"}  # files of other programs, and a component
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
    fusion = config.load(place / "mine/job/fusion.yaml")
    for name in applied:
        runs = fusion if name in ("mine/job", "mine/kueue") else None
        found = check([str(place / f"{name.replace('/', '-')}.yaml")], runs)
        assert [str(problem) for problem in found.problems] == []
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", str(Path(kubectl()).parent), prepend=":")
    (words,) = commands("wrpo")
    assert cli.main(words) == 0
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
    ingress = [b for b in applied["mine/serve"] if b["kind"] == "Ingress"]
    service = next(b for b in applied["mine/serve"] if b["kind"] == "RayService")
    assert f"{service['metadata']['name']}-serve-svc" in str(ingress)
    assert ingress[0]["metadata"]["namespace"] == service["metadata"]["namespace"]


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
