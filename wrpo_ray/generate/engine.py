"""vLLM, in this process: token ids in, n samples out.

Sample i of a prompt has the seed base + i, where the base is a hash of run seed, model and
prompt: samples can be asked for one at a time or together, and a second call asks only for
what is missing. Not covered: tensor parallelism across nodes, images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.core.chat import end_ids, load_tokenizer, prompt_ids
from wrpo_ray.core.records import Message, digest, failure

Row = dict[str, Any]

CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""On the CPU, compiling costs more than small runs take, and bound threads starve each other."""
CPU_ENGINE = {"enforce_eager": True, "dtype": "float32", "enable_chunked_prefill": False}
"""A seeded request whose prefill is split fails on the CPU: its generator has no offset."""
ENV = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True)
class Request:
    """Samples `first` to `first + count` - 1 of one prompt."""

    prompt_id: str
    messages: list[Message]
    first: int
    count: int

    @property
    def samples(self) -> range:
        """The samples' numbers."""
        return range(self.first, self.first + self.count)


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer in the model's context."""


class Engine:
    """A loaded model."""

    def __init__(self, model: ModelConfig, folder: Path, seed: int):
        import vllm

        on_cpu = model.actors.num_gpus == 0
        defaults = CPU_ENGINE if on_cpu else {}
        if model.dtype != "auto":
            defaults = defaults | {"dtype": model.dtype}
        arguments = defaults | {"max_model_len": model.max_model_len} | model.engine
        self.llm = vllm.LLM(model=str(folder), disable_log_stats=True, **arguments)
        self.tokenizer = load_tokenizer(folder, model.chat_template)
        self.ends = sorted(end_ids(self.tokenizer, folder))
        self.context = self.llm.llm_engine.model_config.max_model_len
        self.name = model.name
        self.version = f"vllm {vllm.__version__}"
        self.seed = seed

    def generate(
        self, requests: list[Request], sampling: SamplingConfig
    ) -> tuple[list[Row], list[Row]]:
        """RESPONSE rows (without `model`) of all requests, and FAILURE rows of those that fail."""
        ready, failed = [], []
        for request in requests:
            try:
                ready.append((request, self._prompt_ids(request)))
            except Exception as error:  # a template can raise anything; the row is kept with it
                failed += _failures(self.name, request, error)
        rows, broken = self._generate(ready, sampling)
        return rows, failed + broken

    def _prompt_ids(self, request: Request) -> list[int]:
        ids = prompt_ids(self.tokenizer, request.messages)
        if len(ids) >= self.context:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the context of {self.name} {self.context}"
            )
        return ids

    def _generate(
        self, ready: list[tuple[Request, list[int]]], sampling: SamplingConfig
    ) -> tuple[list[Row], list[Row]]:
        if not ready:
            return [], []
        prompts = [{"prompt_token_ids": ids} for _, ids in ready]
        parameters = [self._parameters(request, sampling) for request, _ in ready]
        try:
            outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        except ValueError as error:
            # vLLM refuses a request by ValueError and says not which: find it by halves.
            if len(ready) == 1:
                return [], _failures(self.name, ready[0][0], error)
            middle = len(ready) // 2
            left, right = (
                self._generate(part, sampling) for part in (ready[:middle], ready[middle:])
            )
            return left[0] + right[0], left[1] + right[1]
        pairs = zip(ready, outputs, strict=True)
        return [row for (request, ids), out in pairs for row in self._rows(request, ids, out)], []

    def _parameters(self, request: Request, sampling: SamplingConfig) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=request.count,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=self._base(request) + request.first,
            stop_token_ids=self.ends,
        )

    def _base(self, request: Request) -> int:
        return int(digest([self.seed, self.name, request.prompt_id], 12), 16)

    def _rows(self, request: Request, ids: list[int], output: Any) -> list[Row]:
        return [
            {
                "prompt_id": request.prompt_id,
                "source": self.name,
                "sample": sample,
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "prompt_tokens": len(ids),
                "output_tokens": len(answer.token_ids),
                "seed": self._base(request) + sample,
                "engine": self.version,
            }
            for sample, answer in zip(request.samples, output.outputs, strict=True)
        ]


def _failures(source: str, request: Request, error: Exception) -> list[Row]:
    return [
        failure("generate", error, prompt_id=request.prompt_id, source=source, sample=sample)
        for sample in request.samples
    ]
