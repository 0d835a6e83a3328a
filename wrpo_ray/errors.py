"""The project's own errors. Each message says in one line what is wrong and what to do."""


class WrpoError(Exception):
    """Root of the project's own errors; the CLI prints its text without a traceback.

    Example:
        >>> issubclass(UserError, WrpoError)
        True
    """


class UserError(WrpoError, ValueError):
    """A problem in the config, the data or the environment that the user can fix.

    Example:
        >>> raise UserError("prompts: no such file: prompts.jsonl")
        Traceback (most recent call last):
        wrpo_ray.errors.UserError: prompts: no such file: prompts.jsonl
    """


class BrokenFileError(UserError):
    """A file of a run is damaged, or was changed after the run wrote it."""


class FailureLimitError(WrpoError, RuntimeError):
    """More rows of a stage failed than `failure_limit` allows; the failed rows are kept."""


class LeaseError(WrpoError, RuntimeError):
    """Another run holds the output folder."""


class TemplateError(UserError):
    """A chat template rejects a conversation, or fails on it."""


class TokenizeError(UserError):
    """A tokenizer cannot encode a text."""


class SpelledTokenError(UserError):
    """A text contains a special token's spelling, and this tokenizer cannot encode it as text."""


class RegressionError(WrpoError, RuntimeError):
    """A model scores lower than `wrpo evaluate --fail-below` allows."""


class BudgetError(WrpoError, RuntimeError):
    """The budget is spent. Finished work is kept; a run with a higher budget continues."""
