"""What Prometheus finds at a Ray node after a step, and the names that Ray's dashboard shows."""

import os
import re
import urllib.request

import pytest
from support.waiting import wait_until

from wrpo_ray.config import Actors, RewardConfig
from wrpo_ray.data import records
from wrpo_ray.data.buckets import Bucket, write_shard
from wrpo_ray.data.samples import Prompts, Samples
from wrpo_ray.runtime.context import Run
from wrpo_ray.stages.score.stage import Score
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.steps import Step

INTERVAL = "RAY_metrics_report_interval_ms"


def last_digit(messages, response: str, reference: str) -> float:
    if response == "answer 0":
        raise ConnectionError("away")
    return float(response[-1])


@pytest.fixture(scope="module", autouse=True)
def _quick_reports():
    os.environ[INTERVAL] = "500"
    yield
    del os.environ[INTERVAL]


def scraped() -> dict[tuple[str, str, str], float]:
    """{(metric, stage, source): value} of the node's own series."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    found = {}
    for name, labels, value in re.findall(r"^ray_wrpo_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[name, label["stage"], label["source"]] = float(value)
    return found


def test_a_step_is_found_by_prometheus_and_by_name(local_ray, tmp_path):
    root, prompts = Folder(str(tmp_path)), Step("prompts")
    source = Step("generate-a-b", source="a-b")
    keys = [records.digest(n) for n in range(6)]
    for bucket in (Bucket(0, 2), Bucket(1, 2)):
        mine = [n for n, key in enumerate(keys) if key in bucket]
        asked = [{"prompt_id": keys[n], "messages": [], "split": "sft"} for n in mine]
        said = [
            {"prompt_id": keys[n], "source": "a-b", "sample": 0, "text": f"answer {n}"}
            for n in mine
        ]
        write_shard(root / prompts.folder, bucket, records.PROMPT, asked, "all")
        write_shard(root / source.folder, bucket, records.RESPONSE, said, "all")
    reward = RewardConfig(function=f"{__name__}:last_digit", actors=Actors(num_cpus=1))
    samples = Samples(source, Prompts(prompts, ("sft",)), None)
    job = Score(samples, reward, (None,), ("function",))
    Score.run(Run(root, 2, failure_limit=0.5), [job])

    label = ("score-reward", "a-b")
    wait_until(lambda: scraped().get(("rows_total", *label)) == 5)
    found = scraped()
    assert found["failures_total", *label] == 1
    held, idle = (found[f"{name}_seconds_total", *label] for name in ("actor", "idle"))
    assert 0 < idle <= held
    assert not [name for name in found if name[0] == "gpu_seconds_total"]  # none was taken

    from ray._private.state import actors

    assert "score with reward" in {a["ActorClassName"] for a in actors().values()}
