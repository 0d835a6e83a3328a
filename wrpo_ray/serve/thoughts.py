"""The reasoning of a served thinking model, in `reasoning_content` as vLLM's server has it.

vLLM's own parsers are not used: they read markers as single tokens only, and not what the prompt
has opened. As there, `max_tokens` and `stop` hold for reasoning and answer together, and an answer
that ends within its reasoning has no content.
"""

import json
from typing import Any

from wrpo_ray.llm.reasoning import Format, Piece, Splitter, following, split

FIELD = "reasoning_content"
Json = dict[str, Any]


def is_apart(body: Json) -> bool:
    """Whether the answer to a chat can have reasoning: a grammar holds from its first token."""
    kind = (body.get("response_format") or {}).get("type", "text")
    choice = body.get("tool_choice")
    return kind == "text" and not (body.get("tools") and choice not in (None, "auto", "none"))


class Thoughts:
    """Rewrites the JSON texts of one answer, or of one stream."""

    def __init__(self, format_: Format):
        self.format = format_
        self._splitters: dict[int, Splitter] = {}

    def whole(self, text: str) -> str:
        """Return a whole answer with the reasoning of each choice apart."""
        answer: Json = json.loads(text)
        for choice in answer["choices"]:
            message = choice["message"]
            parts = split(message.get("content") or "", self.format)
            if parts.before:
                message |= {"content": parts.answer or None, FIELD: parts.reasoning}
        return _written(answer)

    def chunks(self, texts: list[str]) -> list[str]:
        """Return the chunks of a stream, without those that hold nothing yet."""
        return [chunk for text in texts if (chunk := self._chunk(text))]

    def _chunk(self, text: str) -> str:
        if not text.startswith("{"):
            return text
        chunk: Json = json.loads(text)
        given = chunk["choices"]
        chunk["choices"] = [choice for choice in given if self._rewrite(choice)]
        return "" if given and not chunk["choices"] else _written(chunk)

    def _rewrite(self, choice: Json) -> bool:
        """Rewrite a choice; return whether it holds anything."""
        delta = choice["delta"]
        given = delta.pop("content", None)
        splitter = self._splitters.setdefault(choice["index"], Splitter(self.format))
        pieces = [splitter.feed(given or "")]
        if choice.get("finish_reason"):
            pieces.append(splitter.finish())
        reasoning, content = map("".join, zip(*pieces, strict=True))
        delta |= _fields(Piece(reasoning, content))
        is_first = given == "" and "role" in delta
        if is_first:
            delta["content"] = ""
        keys = {name for name, value in delta.items() if value is not None}
        return bool(keys or choice.get("finish_reason") or choice.get("logprobs"))


def thoughts_on(body: Json, format_: Format, tokenizer: Any) -> Thoughts | None:
    """Return what finds the reasoning in the answer to a chat; None if it can have none.

    The token ids of a prompt with tools are not known here: it is taken to end as others do.
    """
    if not is_apart(body):
        return None
    prompt = body.get("kv_transfer_params", {}).get("prompt_token_ids")
    return Thoughts(following(format_, tokenizer, prompt) if prompt else format_)


def _fields(piece: Piece) -> Json:
    given = {FIELD: piece.reasoning, "content": piece.answer}
    return {name: text for name, text in given.items() if text}


def _written(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
