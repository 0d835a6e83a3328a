"""The overlays `job` and `serve` on the Ray nodes that KubeRay would start for them.

Engines and training are real, on the CPU: the configs ask for the groups' custom resources and for
no GPU.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import yaml
from ray.job_submission import JobSubmissionClient
from support.manifests import objects
from support.ray_head import free_ports
from support.rehearsal import Rehearsal, submission
from support.waiting import LIMIT, wait_until

from wrpo_ray.serve.keys import new_key

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def test_the_job_runs_to_its_end_on_the_groups_that_its_config_names(demo, zoo, tmp_path: Path):
    """The entrypoint of the overlay, with its resources and environment, and a config of ours."""
    output, of = tmp_path / "run", {"max": 1, "resources": {"generate-1gpu": 1}}
    source = {"name": "llama-bytes", "model": str(zoo / "sources" / "llama-bytes"), "actors": of}
    config = demo(
        output,
        prompts={"path": str(zoo / "prompts.jsonl"), "limit": 60},
        sources=[source],
        target={"name": "target", "model": str(zoo / "target"), "actors": of},
        sft=None,  # a second training and its answers would use the same groups again
        split={"sft": 0},
        evaluate=None,
    )
    tree = yaml.safe_load(config.config.read_text())
    tree["reward"]["actors"] = {"max": 1, "resources": {"reward": 1}}
    tree["wrpo"] |= {"workers": 1, "resources": {"train": 1}}
    rendered = copy.deepcopy(objects("overlays/job"))
    for (kind, _), body in rendered.items():
        if kind == "ConfigMap":
            assert set(body["data"]) == {"fusion.yaml"}
            body["data"]["fusion.yaml"] = yaml.safe_dump(tree)
    seen: Counter[str] = Counter()
    with Rehearsal(rendered, "RayJob", idle_seconds=2) as cluster:
        client = JobSubmissionClient(cluster.api)
        job = client.submit_job(**submission(cluster))

        def has_ended() -> bool:
            groups = Counter(_groups(cluster))
            for group, count in groups.items():
                seen[group] = max(seen[group], count)
            return client.get_job_status(job) in ENDED

        wait_until(has_ended, cluster.process)
        assert client.get_job_status(job) == "SUCCEEDED", client.get_job_logs(job)[-5000:]
        wait_until(lambda: not _groups(cluster), cluster.process)
    print(dict(seen))
    assert (output / "summary.json").is_file()
    assert set(seen) == {"cpu", "generate-1gpu", "reward", "train"}
    assert {count for group, count in seen.items() if group != "cpu"} == {1}


def _groups(cluster: Rehearsal) -> list[str]:
    """The groups of the nodes that live, one for each node but the head."""
    from ray.util.state import list_nodes

    names = {"cpu", *(g["groupName"] for g in cluster.spec["workerGroupSpecs"])}
    nodes = list_nodes(cluster.api, [("state", "=", "ALIVE")], raise_on_missing_output=False)
    return [
        next((n for n in names if n in node.resources_total), "cpu")
        for node in nodes
        if not node.is_head_node
    ]


# --- the served model --------------------------------------------------------------------------


class Client(threading.Thread):
    """Asks again and again, and notes what it was told, and when it asked."""

    def __init__(self, url: str, key: str, stop: threading.Event):
        super().__init__()
        self.url, self.key, self.stop = url, key, stop
        self.answers: list[tuple[float, str]] = []
        """When each was asked for, and its text, or what was wrong with it."""

    def run(self) -> None:
        with httpx.Client(timeout=LIMIT) as http:
            while not self.stop.is_set():
                asked = time.monotonic()
                try:
                    text = ask(http, self.url, self.key)
                except Exception as error:
                    text = f"failed: {error!r}"
                self.answers.append((asked, text))
                self.stop.wait(0.1)  # below the overlay's limit of a key


def ask(http: httpx.Client, url: str, key: str) -> str:
    body = {"model": "fused", "prompt": "Vowels in jaf:", "max_tokens": 100, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}"}
    answer = http.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_changed_model_is_served_in_place_and_no_request_is_lost(zoo: Path, tmp_path: Path):
    """The operator's request to Serve with another model, in the middle of four clients' requests.

    Each answer is the old model's or the new one's, and only the new one's after the change.
    """
    port, metrics, stats, fallback = free_ports(4)
    proxy = {
        "CONFIG_FILE_LOC": tmp_path / "haproxy.cfg",
        "SOCKET_PATH": cluster_file("admin.sock"),
        "SERVER_STATE_BASE": tmp_path,
        "SERVER_STATE_FILE": tmp_path / "server-state",
        "METRICS_SOCKET_PATH": cluster_file("metrics.sock"),
        "METRICS_PORT": metrics,
        "STATS_PORT": stats,
        "LOG_TARGET": tmp_path / "nobody-listens.sock",
    }
    env = {f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in proxy.items()}
    env["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(fallback)
    (key, *keys), lines = zip(*(new_key(f"client-{i}") for i in range(5)), strict=True)
    secrets = {"wrpo-serve-keys": {"keys": "\n".join(lines)}}
    with Rehearsal(objects("overlays/serve"), "RayService", secrets, env) as cluster:
        config = serve_config(cluster, port, zoo / "target")
        url, stop = f"http://127.0.0.1:{port}", threading.Event()
        put(cluster, config)
        wait_until(lambda: is_running(cluster), cluster.process)
        with httpx.Client(timeout=LIMIT) as http:
            wait_until(lambda: http.get(f"{url}/ready").status_code == 200, cluster.process)
            old = ask(http, url, key)
        before = replicas(cluster)
        clients = [Client(url, key, stop) for key in keys]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: all(len(client.answers) >= 5 for client in clients))
            put(cluster, serve_config(cluster, port, zoo / "sources" / "llama-bytes"))
            running: list[int] = []

            def is_changed() -> bool:
                if status(cluster)["deployments"]:  # none while Serve builds the application
                    running.append(len(replicas(cluster, "RUNNING")))
                return is_running(cluster) and not before & replicas(cluster)

            wait_until(is_changed, cluster.process)
            changed = time.monotonic()
            count = [len(client.answers) for client in clients]
            wait_until(
                lambda: all(
                    len(client.answers) >= n + 10 for client, n in zip(clients, count, strict=True)
                )
            )
        finally:
            stop.set()
            for client in clients:
                client.join()
        with httpx.Client(timeout=LIMIT) as http:
            new = ask(http, url, key)
    answers = [answer for client in clients for answer in client.answers]
    found = Counter({old: "old", new: "new"}.get(text, text) for _, text in answers)
    late = {text for asked, text in answers if asked > changed}
    print(dict(found))
    assert old != new
    assert set(found) == {"old", "new"}
    assert late == {new}
    assert min(running) >= 1, "a model that answers, at each moment"


def cluster_file(name: str) -> str:
    """A short path, for a socket."""
    return f"/tmp/{name}-{free_ports(1)[0]}"


def serve_config(cluster: Rehearsal, port: int, model: Path) -> dict[str, Any]:
    """The RayService's own, with a model that runs on a CPU and a port of its own."""
    config = yaml.safe_load(cluster.local(cluster.body["spec"]["serveConfigV2"]))
    config["http_options"] |= {"port": port, "host": "127.0.0.1"}
    config["proxy_location"] = "HeadOnly"  # nodes of one machine have its ports and files together
    (served,) = config["applications"][0]["args"]["models"]
    served["model"] = str(model)
    served["actors"] |= {"max": 1, "num_gpus": 0, "num_cpus": 1}
    return config


def put(cluster: Rehearsal, config: dict[str, Any]) -> None:
    """As the operator does (utils/dashboardclient/dashboard_httpclient.go:UpdateDeployments)."""
    url = f"{cluster.api}/api/serve/applications/"
    answer = httpx.put(url, content=json.dumps(config), timeout=LIMIT)
    assert answer.status_code == 200, answer.text


def status(cluster: Rehearsal) -> dict[str, Any]:
    (app,) = (
        httpx.get(f"{cluster.api}/api/serve/applications/", timeout=LIMIT)
        .json()["applications"]
        .values()
    )
    return app


def is_running(cluster: Rehearsal) -> bool:
    app = status(cluster)
    assert app["status"] != "DEPLOY_FAILED", app["message"]
    return app["status"] == "RUNNING"


def replicas(cluster: Rehearsal, state: str | None = None) -> set[str]:
    """Those of the model, in any state or in one."""
    (model,) = (d for name, d in status(cluster)["deployments"].items() if "Model" in name)
    return {r["replica_id"] for r in model["replicas"] if state in (None, r["state"])}
