"""The source kind `endpoint`: a model behind an OpenAI-compatible server.

Each sample is a call of its own, because servers differ in `n`; its seed is that of the other
engines, cut to the 31 bits that all servers take. Text comes back and no token ids: the server
renders the conversation, by its own template.
"""

from collections import defaultdict
from collections.abc import Iterator

from wrpo_ray.config import ModelConfig, SamplingConfig
from wrpo_ray.data.records import FailureRow, failure
from wrpo_ray.llm.completion import INT32, Completion, EndpointError
from wrpo_ray.llm.endpoint_client import Body, Endpoint
from wrpo_ray.llm.reasoning import put_apart_unseen
from wrpo_ray.stages.generate.vllm_engine import Answers, Request, Row, SamplingIdentity, seed_of

NEUTRAL = {"top_k": 0, "min_p": 0, "repetition_penalty": 1}
"""Not among OpenAI's own fields, so that they are sent only where they do something."""


class EndpointEngine:
    """Answers as an engine does."""

    def __init__(self, model: ModelConfig, seed: int):
        assert model.endpoint is not None
        self.identity = SamplingIdentity(model.name, seed)
        self.model = model
        self.endpoint = Endpoint(model.endpoint, model.model, thinks=model.reasoning is not None)

    def answers(
        self,
        requests: list[Request],
        sampling: SamplingConfig,
        identity: SamplingIdentity | None = None,
    ) -> Iterator[Answers]:
        """The answers of one request after another, as they finish; threads may call at once.

        Raises:
            UserError: no call can be answered; see `Endpoint`.
        """
        identity = identity or self.identity
        asked = [(r, sample) for r, request in enumerate(requests) for sample in request.samples]
        bodies = (self._body(requests[r], sample, sampling, identity) for r, sample in asked)
        gathered: defaultdict[int, Answers] = defaultdict(lambda: ([], []))
        for index, answer in self.endpoint.complete_all(bodies):
            r, sample = asked[index]
            rows, failed = gathered[r]
            if isinstance(answer, EndpointError):
                failed.append(self._failure(requests[r], sample, answer, identity))
            else:
                rows.append(self._row(requests[r], sample, answer, sampling, identity))
            if len(rows) + len(failed) == requests[r].count:
                yield gathered.pop(r)

    def under_way(self) -> dict[int, dict[str, int]]:
        """Nothing: servers tell no tokens before an answer ends."""
        return {}

    def _body(
        self, request: Request, sample: int, sampling: SamplingConfig, identity: SamplingIdentity
    ) -> Body:
        settings = sampling.model_dump(exclude={"samples", "logprobs", "seeds"})
        if sampling.logprobs:
            settings |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        settings = {n: value for n, value in settings.items() if NEUTRAL.get(n) != value}
        seed = _seed(request, sample, sampling, identity)
        asked = {"messages": request.messages} | ({} if seed is None else {"seed": seed})
        return asked | settings

    def _row(
        self,
        request: Request,
        sample: int,
        answer: Completion,
        sampling: SamplingConfig,
        identity: SamplingIdentity,
    ) -> Row:
        row = {
            "prompt_id": request.prompt_id,
            "source": identity.name,
            "sample": sample,
            "text": answer.text,
            "token_ids": None,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "seed": _seed(request, sample, sampling, identity),
            "engine": f"openai {self.endpoint.host}/{answer.model}",
            "logprobs": answer.logprobs,
        }
        return put_apart_unseen(row, self.model, answer.reasoning)

    def _failure(
        self, request: Request, sample: int, error: EndpointError, identity: SamplingIdentity
    ) -> FailureRow:
        return failure(
            "generate",
            error,
            attempts=error.attempts,
            prompt_id=request.prompt_id,
            source=identity.name,
            sample=sample,
        )


def _seed(
    request: Request, sample: int, sampling: SamplingConfig, identity: SamplingIdentity
) -> int | None:
    seed = seed_of(request, sample, sampling, identity)
    return None if seed is None else seed % INT32
