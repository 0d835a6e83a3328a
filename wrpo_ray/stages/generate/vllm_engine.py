"""vLLM, in this process: token ids in, n samples out, each answer as soon as it is finished.

The engine runs in a thread of its own. Callers from any thread submit requests and take
answers, so that a second bucket's requests fill the batch while the first one's long answers
finish. Sample i of a prompt has the seed base + i, where the base is a hash of run seed,
model and prompt: samples can be asked for one at a time or together, and a second call asks
only for what is missing. With `sampling.seeds: run` requests have no seeds, and each start of an
engine has another one. Models that differ only in their weights can share one engine in turn:
loading weights takes a moment, starting an engine up to minutes. Not covered: images.
"""

import os
import secrets
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.data.records import FailureRow, Message, failure
from wrpo_ray.llm.architecture import Use, check_weights
from wrpo_ray.llm.chat import end_ids, prompt_ids, separator
from wrpo_ray.llm.reasoning import Format, following, format_of, put_apart
from wrpo_ray.llm.rendering import Template, load_tokenizer
from wrpo_ray.llm.vllm_settings import (
    CPU_ENGINE,
    PARALLEL_ENGINE,
    cpu_slots,
    quick_imports,
    weight_bytes,
)
from wrpo_ray.llm.weight_stream import stream_arguments, stream_env, streams
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import Folder

Row = dict[str, Any]
Answers = tuple[list[Row], list[FailureRow]]
"""RESPONSE rows (without `model`), and FAILURE rows, of one request."""


@dataclass(frozen=True)
class Request:
    """Samples `first` to `first + count` - 1 of one prompt."""

    prompt_id: str
    messages: list[Message]
    first: int
    count: int
    job: int = 0
    """Its answers under way are counted by this number."""

    @property
    def samples(self) -> range:
        """The sample numbers."""
        return range(self.first, self.first + self.count)


def requests_for(prompt: Row, samples: list[int], job: int = 0) -> list[Request]:
    """Return requests for some samples of a PROMPT row, one for each run of consecutive numbers.

    Example:
        >>> asked = requests_for({"prompt_id": "p", "messages": []}, [0, 1, 4])
        >>> [(request.first, request.count) for request in asked]
        [(0, 2), (4, 1)]
    """
    groups = groupby(enumerate(samples), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [Request(prompt["prompt_id"], prompt["messages"], run[0], len(run), job) for run in runs]


@dataclass(frozen=True)
class SamplingIdentity:
    """The source's name and seed, which samples are drawn by, and its weights if on vLLM."""

    name: str
    seed: int
    folder: Path | None = None


class Engine(Protocol):
    """A model that answers: on vLLM, or behind an endpoint."""

    def answers(
        self,
        requests: list[Request],
        sampling: SamplingConfig,
        identity: SamplingIdentity | None = None,
    ) -> Iterator[Answers]:
        """The answers of one request after another, as they finish; threads may call at once.

        `identity` defaults to the one that the engine was created with.
        """

    def under_way(self) -> Mapping[int, Mapping[str, int]]:
        """The counts of `UnderWay` by the number of their job, for any thread."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer in the model's context."""


def seed_base(seed: int, source: str, prompt_id: str) -> int:
    """The seed of a prompt's sample 0; sample i has this + i."""
    return int(digest([seed, source, prompt_id], 12), 16)


def seed_of(
    request: Request, sample: int, sampling: SamplingConfig, identity: SamplingIdentity
) -> int | None:
    """The seed of a sample; None if the engine draws all by one of its own."""
    if sampling.seeds == "run":
        return None
    return seed_base(identity.seed, identity.name, request.prompt_id) + sample


def failures(source: str, request: Request, error: Exception, **more: Any) -> Answers:
    """Return the failures of a request none of whose samples could be generated."""
    return [], [
        failure("generate", error, prompt_id=request.prompt_id, source=source, sample=s, **more)
        for s in request.samples
    ]


@dataclass(frozen=True)
class _Asked:
    """A request that the engine works on, and the queue for its answers."""

    request: Request
    ids: list[int]
    sampling: SamplingConfig
    identity: SamplingIdentity
    out: SimpleQueue[Answers | Exception]
    format: Format | None = None
    """How its answers show their reasoning; null if they are not read for it."""


def engine_arguments(model: ModelConfig, weights: int) -> dict[str, Any]:
    """Return vLLM's arguments for an engine of so many bytes; those of its config go first."""
    arguments: dict[str, Any] = {
        "dtype": model.dtype,
        "quantization": model.quantization,
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": model.tensor_parallel,
        "pipeline_parallel_size": model.pipeline_parallel,
        "seed": secrets.randbelow(2**31),  # of requests without one: no two starts draw alike
    }
    if not model.actors.num_gpus:
        arguments |= CPU_ENGINE | {"max_num_seqs": cpu_slots(weights)}
    elif model.parts > 1:
        arguments |= PARALLEL_ENGINE
    arguments |= {"distributed_executor_backend": "ray"} if model.parts > 1 else {}
    return arguments | model.performance | model.engine


class VllmEngine:
    """A model that is loaded in the engine's thread; errors of loading are raised here.

    Requests of other identities may name other weights of the same shape, tokenizer and template.
    `source` is what `folder` is a copy of: weights that are streamed are read there.
    """

    def __init__(self, model: ModelConfig, folder: Path, seed: int, source: Folder | None = None):
        self.identity = SamplingIdentity(model.name, seed, folder)
        self._loaded: Path | None = folder
        self.tokenizer = load_tokenizer(folder, Template.of(model))
        self.ends = sorted(end_ids(self.tokenizer, folder))
        self.separator = separator(self.tokenizer)
        self.policy = model.reasoning or "strip"
        self.format = format_of(self.tokenizer, model.reasoning_parser) if model.reasoning else None
        self._inbox: SimpleQueue[_Asked] = SimpleQueue()
        self._asked: dict[str, _Asked] = {}
        self._held: _Asked | None = None
        loaded: SimpleQueue[Exception | None] = SimpleQueue()
        store = source if source and streams(model, source) else None
        loading = partial(self._load, model, folder, store)
        threading.Thread(target=self._work, args=(loading, loaded), daemon=True).start()
        if error := loaded.get():
            raise error

    def answers(
        self,
        requests: list[Request],
        sampling: SamplingConfig,
        identity: SamplingIdentity | None = None,
    ) -> Iterator[Answers]:
        """The answers of one request after another, as they finish; threads may call at once."""
        identity = identity or self.identity
        out: SimpleQueue[Answers | Exception] = SimpleQueue()
        for request in requests:
            try:
                ids = self._prompt_ids(request, identity.name)
                format_ = self.format and following(self.format, self.tokenizer, ids)
                self._inbox.put(_Asked(request, ids, sampling, identity, out, format_))
            except Exception as error:  # a template can raise anything; the row is kept with it
                out.put(failures(identity.name, request, error))
        for _ in requests:
            answers = out.get()
            if isinstance(answers, Exception):
                raise answers
            yield answers

    def under_way(self) -> dict[int, Counter[str]]:
        """Count the answers that have tokens and were not returned, by job; for any thread.

        Each look takes a moment for each of them, and a token takes nothing. A request ends with
        its longest answer; until then vLLM keeps the others.
        """
        held, found = self.engine.output_processor, defaultdict[int, Counter[str]](Counter)
        begun = dict[str, _Asked]()

        def add(key: str, name: str, tokens: int) -> None:
            if tokens and (asked := self._asked.get(key)):
                begun[key] = asked
                found[asked.request.job].update({name: 1, f"{name}_tokens": tokens})

        for state in list(held.request_states.values()):  # in one step: the engine changes it
            add(state.external_req_id, "running", state.detokenizer.num_output_tokens())
        for parent in list(held.parent_requests.values()):
            for answer in filter(None, list(parent.output_aggregator)):
                add(parent.external_req_id, "ended", len(answer.token_ids))
        for asked in begun.values():
            found[asked.request.job]["prompt_tokens"] += len(asked.ids)
        return found

    def _prompt_ids(self, request: Request, name: str) -> list[int]:
        ids = prompt_ids(self.tokenizer, request.messages)
        if len(ids) >= self.context:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the context of {name} {self.context}"
            )
        return ids

    # --- the engine's thread

    def _work(self, load: Callable[[], None], loaded: SimpleQueue[Exception | None]) -> None:
        try:
            load()
        except Exception as error:  # raised by the constructor
            loaded.put(error)
            return
        loaded.put(None)
        try:
            while True:
                self._step()
        except Exception as error:  # the engine has failed, and with it all its requests
            for asked in (*self._asked.values(), *([self._held] if self._held else [])):
                asked.out.put(error)
            while True:
                self._inbox.get().out.put(error)

    def _load(self, model: ModelConfig, folder: Path, store: Folder | None) -> None:
        check_weights(folder, Use.ANSWERS, store)
        with quick_imports():
            import vllm
            from vllm import LLM

        arguments = engine_arguments(model, weight_bytes(store or Folder(str(folder))))
        if store:
            os.environ.update(stream_env(store))
            arguments |= stream_arguments(store)
        llm = LLM(model=str(folder), disable_log_stats=True, **arguments)
        self.engine = llm.llm_engine
        self.context = self.engine.model_config.max_model_len
        self.version = f"vllm {vllm.__version__}"

    def _step(self) -> None:
        """Accept new requests, waiting for one if idle, and run one step of the engine.

        A request for other weights is held until all answers of the loaded ones are finished.
        """
        while self._held or not self._inbox.empty() or not self._asked:
            self._held = self._held or self._inbox.get()
            if self._held.identity.folder != self._loaded:
                if self._asked:
                    break
                self._load_weights(self._held.identity.folder)
            self._add(self._held)
            self._held = None
        for output in self.engine.step():
            if output.finished:
                asked = self._asked.pop(output.request_id)
                asked.out.put((self._rows(asked, output), []))

    def _load_weights(self, folder: Path | None) -> None:
        if folder is not None:
            check_weights(folder, Use.ANSWERS)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the engine keeps what it computed with other weights")
        self._loaded = folder

    def _add(self, asked: _Asked) -> None:
        key = f"{asked.request.prompt_id}/{asked.request.first}/{id(asked)}"
        try:
            prompt = {"prompt_token_ids": asked.ids}
            self.engine.add_request(key, prompt, self._parameters(asked))
        except ValueError as error:  # how vLLM refuses a request
            asked.out.put(failures(asked.identity.name, asked.request, error))
        else:
            self._asked[key] = asked

    def _parameters(self, asked: _Asked) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request, sampling, identity = asked.request, asked.sampling, asked.identity
        return SamplingParams(
            n=request.count,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            logprobs=sampling.logprobs or None,
            max_tokens=sampling.max_tokens,
            seed=seed_of(request, request.first, sampling, identity),
            stop_token_ids=self.ends,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_special_tokens=not (self.format and self.format.is_special),
        )

    def _rows(self, asked: _Asked, output: Any) -> list[Row]:
        request, identity = asked.request, asked.identity
        rows = [
            {
                "prompt_id": request.prompt_id,
                "source": identity.name,
                "sample": sample,
                "text": answer.text.removeprefix(self.separator),
                "token_ids": list(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "prompt_tokens": len(asked.ids),
                "output_tokens": len(answer.token_ids),
                "seed": seed_of(request, sample, asked.sampling, identity),
                "engine": self.version,
                "logprobs": _first_token(answer.logprobs),
            }
            for sample, answer in zip(request.samples, output.outputs, strict=True)
        ]
        if asked.format is None:
            return rows
        return [put_apart(row, asked.format, self.policy, self._decode) for row in rows]

    def _decode(self, ids: list[int]) -> str:
        """Return the text of an answer's token ids as the engine gives it."""
        is_skipped = not (self.format and self.format.is_special)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=is_skipped)
        return text.removeprefix(self.separator)


def _first_token(logprobs: Any) -> list[Row] | None:
    """Return vLLM's log-probabilities of the likeliest first tokens, as LOGPROBS has them."""
    if not logprobs:
        return None
    return [{"token": p.decoded_token, "logprob": p.logprob} for p in logprobs[0].values()]
