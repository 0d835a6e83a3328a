"""Errors of workers and of Ray, as one line that names the root cause."""

import traceback
from collections.abc import Callable, Iterator
from typing import Any

from wrpo_ray import errors
from wrpo_ray.errors import WrpoError
from wrpo_ray.llm.vllm_settings import with_root_cause


def capture_error(
    what: str, function: Callable[[dict[str, Any]], dict[str, Any]], row: dict[str, Any]
) -> dict[str, Any]:
    """Return the function's result, or its error as a row for `restore_error`."""
    try:
        return function(row)
    except Exception as error:  # of any kind: the driver reports it
        own = (
            error if isinstance(error, WrpoError) else summarize_error(with_root_cause(error), what)
        )
        return {"error": type(own).__name__, "message": str(own), "trace": traceback.format_exc()}


def restore_error(result: dict[str, Any]) -> WrpoError:
    """The error that `capture_error` returned as a row."""
    kind: type[WrpoError] = getattr(errors, result["error"])
    error = kind(result["message"])
    error.__cause__ = RuntimeError(result["trace"])  # shown with WRPO_DEBUG
    return error


def summarize_error(error: BaseException, what: str) -> WrpoError:
    """The WrpoError inside an error of Ray; without one, a WrpoError that names the root cause."""
    causes = list(_causes(error))
    own = next((cause for cause in causes if isinstance(cause, WrpoError)), None)
    if own is not None:
        return own
    text = " ".join(str(causes[-1]).split())[:500]
    return WrpoError(
        f"{what} failed: {type(causes[-1]).__name__}: {text}; fix the cause and run the same "
        f"command again to resume (WRPO_DEBUG=1 shows the whole trace)"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the errors that it wraps, outermost first."""
    while error is not None:
        yield error
        failures = list(getattr(error, "worker_failures", {}).values())
        inner = [getattr(error, "controller_failure", None), getattr(error, "_base_exc", None)]
        inner += [*failures, getattr(error, "cause", None), error.__cause__]
        error = next((e for e in inner if isinstance(e, BaseException)), None)
