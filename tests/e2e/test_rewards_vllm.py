"""A classifier's rewards by vLLM equal those by transformers, also where the end of turn pads."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
from wrpo_ray.config import RewardConfig
from wrpo_ray.stages.score.base import Item
from wrpo_ray.stages.score.rewards import load_reward

asked = [{"role": "user", "content": "w1 w2"}]
items = [Item(asked, text, None) for text in json.loads(sys.argv[2])]
config = RewardConfig(model="m", engine="vllm", max_length=100)
reward = load_reward(config, [Path(sys.argv[1])])
assert reward.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching  # of a shared prompt
scores = reward.score(items)
Path(sys.argv[3]).write_text(json.dumps([s if isinstance(s, float) else str(s) for s in scores]))
"""


def test_vllm_gives_the_rewards_of_transformers(tmp_path):
    import torch
    from support.tiny_models import make_model, make_tokenizer
    from transformers import LlamaForSequenceClassification

    from wrpo_ray.config import RewardConfig
    from wrpo_ray.llm.vllm_settings import engine_env
    from wrpo_ray.stages.score.base import Item
    from wrpo_ray.stages.score.rewards import load_reward

    config = make_model().config
    config.num_labels, config.pad_token_id = 1, config.eos_token_id
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.score.weight.data *= 20  # rewards that a sigmoid would flatten
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    texts = [" ".join(f"w{(7 * n + i) % 40}" for i in range(n)) for n in (1, 3, 9, 30, 2, 90)]
    out = tmp_path / "scores.json"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(texts), str(out)]
    result = subprocess.run(
        command, env=os.environ | engine_env(on_gpu=False), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    scores = json.loads(out.read_text())
    plain = load_reward(RewardConfig(model="m", max_length=100), [tmp_path]).score(
        [Item([{"role": "user", "content": "w1 w2"}], text, None) for text in texts]
    )
    assert scores[:5] == pytest.approx(plain[:5], abs=1e-3)
    assert max(scores[:5]) - min(scores[:5]) > 5
    assert scores[5] == str(plain[5])
