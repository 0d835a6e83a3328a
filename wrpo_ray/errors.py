"""The errors a user can meet. Each says in one line what is wrong and what to do."""


class WrpoError(Exception):
    """Root of the project's own errors; the CLI prints its text without a traceback."""


class UserError(WrpoError, ValueError):
    """Something in the config, the data or the surroundings that the user can put right."""


class BrokenFileError(UserError):
    """A file of a run does not hold what a run writes there."""


class FailureLimitError(WrpoError, RuntimeError):
    """More rows of a stage failed than `failure_limit` allows; the failed rows are kept."""


class LeaseError(WrpoError, RuntimeError):
    """Another run holds the output folder."""


class TemplateError(UserError):
    """A chat template refuses a conversation, or fails on it."""


class TokenizeError(UserError):
    """A tokenizer cannot encode a text."""


class SpelledTokenError(UserError):
    """A text spells a special token, and this tokenizer cannot keep it text."""


class RegressionError(WrpoError, RuntimeError):
    """A model does worse than `wrpo evaluate --fail-below` allows."""


class BudgetError(WrpoError, RuntimeError):
    """The budget is spent; all that is finished is kept, and a higher budget goes on."""
