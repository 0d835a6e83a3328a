"""Rows of recorded answers to records: pure functions."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import repeat
from typing import Any

from wrpo_ray.config import RecordedAnswers
from wrpo_ray.data.published import RowError, check_text
from wrpo_ray.data.records import UNFINISHED, FailureRow, Message, failure, prompt_id
from wrpo_ray.llm.reasoning import put_apart_unseen
from wrpo_ray.stages.ingest.cells import exact_text
from wrpo_ray.stages.ingest.readers import cell_of, messages_of, name_of, number_of

Row = dict[str, Any]
ENDS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens"), "length"),
}
"""How an answer ended, by the names that servers and data sets have for it."""
MOST_IDS = 2**31
SHOWN = 80
"""Maximum characters of a prompt in an example."""


def is_of(row: Row, given: RecordedAnswers, source: str) -> bool:
    """Whether a row holds answers of the source; RowError if the row names none."""
    column = given.columns.source
    return column is None or name_of(cell_of(row, column), column) == (given.of or source)


def recorded_answers(
    row: Row, given: RecordedAnswers, source: str, where: str
) -> list[Row | RowError]:
    """Return an answer for each text of a row, with the key of its prompt; RowErrors for bad ones.

    The key is `prompt_id`, or `id` where answers are matched by an id.

    Raises:
        RowError: the prompt or its id cannot be used, or lists differ in length.
    """
    columns = given.columns
    key = _key(row, given) | {"source": source, "where": where}
    is_thought = bool(columns.reasoning and row.get(columns.reasoning))
    texts = row.get(columns.response) if is_thought else cell_of(row, columns.response)
    if texts == []:
        raise RowError(f"{columns.response!r} is an empty list")
    names = (columns.reward, columns.finish_reason, columns.token_ids, columns.reasoning)
    of_all = [_listed(row, name, texts) for name in names]
    listed = texts if isinstance(texts, list) else [texts]
    return [_answer(key, given, *parts) for parts in zip(listed, *of_all, strict=False)]


def _key(row: Row, given: RecordedAnswers) -> Row:
    """The key of the prompt, and a text that shows it."""
    columns = given.columns
    if columns.id:
        known = exact_text(cell_of(row, columns.id), columns.id)
        return {"id": known, "shown": f"{columns.id} {known}"[:SHOWN]}
    messages = messages_of(row, columns)
    return {"prompt_id": prompt_id(messages), "shown": _beginning(messages)}


def _listed(row: Row, column: str | None, texts: Any) -> Iterable[Any]:
    """The values of a column, one for each of the row's texts; null for all where it has none."""
    value = row.get(column) if column else None
    if value is None:
        return repeat(None)
    if not isinstance(texts, list):
        return [value]
    if not isinstance(value, list) or len(value) != len(texts):
        count = len(value) if isinstance(value, list) else "no list"
        raise RowError(f"{column!r} has to hold a value for each of {len(texts)} answers ({count})")
    return value


def _answer(
    key: Row, given: RecordedAnswers, text: Any, reward: Any, reason: Any, ids: Any, thought: Any
) -> Row | RowError:
    columns = given.columns
    try:
        reasoning = _reasoning(thought, columns.reasoning)
        if text is None and reasoning is not None:
            text = ""
        if not isinstance(text, str):
            raise RowError(f"{columns.response!r} has to be a text (got {type(text).__name__})")
        score = None
        if columns.reward and (given.reward or reward is not None):
            score = number_of(reward, columns.reward)
        token_ids = _token_ids(ids, columns.token_ids)
        answer = key | {
            "text": check_text(text),
            "reward": score,
            "finish_reason": _reason(reason, columns.finish_reason),
            "token_ids": token_ids,
            "output_tokens": len(token_ids) if token_ids else None,
            "engine": "recorded",
            "reward_model": f"column {columns.reward}",
        }
        return _put_apart(answer, given, reasoning)
    except RowError as error:
        return error


def _reasoning(value: Any, column: str | None) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(f"{column!r} has to be a text (got {type(value).__name__})")
    return check_text(value) if value.strip() else None


def _put_apart(answer: Row, given: RecordedAnswers, reasoning: str | None) -> Row:
    """Return the answer with its reasoning apart; one that ends within it was cut off."""
    found = put_apart_unseen(answer, given, reasoning)
    if found.get("reasoning_state") == UNFINISHED and found["finish_reason"] is None:
        return found | {"finish_reason": "length"}
    return found


def _reason(value: Any, column: str | None) -> str | None:
    if value is None:
        return None
    found = ENDS.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        raise RowError(f"{column!r} has to be one of {', '.join(ENDS)} (got {str(value)[:40]!r})")
    return found


def _token_ids(value: Any, column: str | None) -> list[int] | None:
    if value is None:
        return None
    is_list = isinstance(value, list) and all(type(i) is int and 0 <= i < MOST_IDS for i in value)
    if not is_list:
        raise RowError(f"{column!r} has to be a list of token ids, whole numbers from 0")
    return value or None


# --- all answers of some prompts -----------------------------------------------------------------


def settled(rows: list[Row], stage: str) -> tuple[list[Row], list[FailureRow]]:
    """Return each answer once with its number `sample`, and failures of those with two scores.

    The result does not depend on the order of the rows.
    """
    by_text: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_text[row["prompt_id"], row["text"], row.get("reasoning") or ""].append(row)
    kept: list[Row] = []
    failed: list[FailureRow] = []
    samples: dict[str, int] = defaultdict(int)
    for (prompt, *_), same in sorted(by_text.items()):
        scores = sorted({row["reward"] for row in same} - {None})
        if len(scores) > 1:
            failed += [_two_scores(row, scores, stage) for row in same]
            continue
        for row in _distinct(same):
            score = scores[0] if scores else None
            kept.append(row | {"sample": samples[prompt], "reward": score})
            samples[prompt] += 1
    return kept, failed


def _distinct(rows: list[Row]) -> list[Row]:
    """One row for each way that a text ended, in order."""
    unique = {(row["finish_reason"] or "", tuple(row["token_ids"] or ())): row for row in rows}
    return [unique[key] for key in sorted(unique)]


def _two_scores(row: Row, scores: list[float], stage: str) -> FailureRow:
    told = ", ".join(f"{score:g}" for score in scores[:3])
    error = RowError(f"the same answer to the prompt has {len(scores)} scores ({told}); keep one")
    key = {"prompt_id": row["prompt_id"], "source": row["source"]}
    return failure(stage, error, where=row["where"], **key)


def merged_prompts(rows: list[Row], stage: str) -> tuple[list[Row], list[FailureRow]]:
    """Return each prompt once, with its reference and group if any row has them.

    A prompt with two references is a failure: a verifier would take one of them for right. So is
    one with two groups, as rewards, sources and margins can differ between them.
    """
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt_id"]].append(row)
    kept: list[Row] = []
    failed: list[FailureRow] = []
    for key, same in sorted(by_prompt.items()):
        known = {n: sorted({r[n] for r in same} - {None}) for n in ("reference", "group")}
        if unlike := next((name for name, found in known.items() if len(found) > 1), None):
            told = " and ".join(repr(one[:SHOWN]) for one in known[unlike][:2])
            shown = repr(_beginning(same[0]["messages"]))
            error = RowError(f"the prompt {shown} has two {unlike}s, {told}; keep one")
            failed.append(failure(stage, error, prompt_id=key))
        else:
            kept.append(same[0] | {n: found[0] if found else None for n, found in known.items()})
    return kept, failed


def _beginning(messages: list[Message]) -> str:
    """The beginning of the last message, by which a user finds the prompt."""
    return messages[-1]["content"][:SHOWN]
