"""Sections for prices, the budget, and the assumptions of `wrpo plan`."""

from pydantic import Field

from wrpo_ray.config.base import Name, NotNegative, Positive, Section


class PricesConfig(Section):
    """Prices of work, in any one currency.

    A pool has the name of its model or reward, or of its step: `rows-sft`, `rows-wrpo`, `sft`,
    `wrpo`, `dpo`.
    """

    gpu_hour: NotNegative = 0.0
    """Price of a GPU-hour, for pools that are not in `pools`."""
    pools: dict[Name, NotNegative] = {}
    """Price of a GPU-hour by pool, for clusters with several kinds of GPUs."""
    input_tokens: dict[Name, NotNegative] = {}
    """Price of a million prompt tokens by source, for endpoints."""
    output_tokens: dict[Name, NotNegative] = {}
    """Price of a million answer tokens by source, for endpoints."""


class BudgetConfig(Section):
    """Limits on the work in this output, over all calls together; null is no limit.

    A run stops at the next finished bucket, or checkpoint in training, with exit code 3. Work
    that actors had not committed by then is repeated when the run resumes with a higher budget.
    """

    output_tokens: int | None = Field(None, ge=1)
    """Maximum answer tokens of the sources and target-SFT."""
    money: float | None = Field(None, gt=0)
    """Maximum cost by `prices`; with `gpu_hour: 1` it is a limit on GPU-hours."""
    hours: float | None = Field(None, gt=0)
    """Maximum hours of wall-clock time."""


class PlanConfig(Section):
    """Assumptions of `wrpo plan`; values that can be measured in the output replace them.

    A run uses `rates` and `startup` of sources to share GPUs between them until it has measured its
    own.
    """

    prompts: int | None = Field(None, ge=1)
    """Number of prompts (or imported rows), if their file does not exist yet."""
    prompt_tokens: float = Field(200, gt=0)
    """Mean tokens of a prompt."""
    output_tokens: float = Field(400, gt=0)
    """Mean tokens of an answer."""
    rates: dict[Name, Positive] = {}
    """By pool (see `prices`) and for one actor or worker: a model's output tokens a second, the
    reward's answers a second, the tokens a second of `rows-wrpo`, `sft`, `wrpo` and `dpo`."""
    parameters: dict[Name, Positive] = {}
    """Active parameters by model, to estimate rates of models whose files do not exist yet."""
    startup: dict[Name, NotNegative] = {}
    """Startup time of an engine in seconds, by model; estimated from its size if not given."""
    gpu_tflops: float = Field(990, gt=0)
    """Dense bf16 TFLOP/s of a GPU, to estimate rates; the default is an H100's."""
    gpu_memory: float = Field(80, gt=0)
    """Memory of a GPU in GB (10^9 bytes), to tell whether training fits; the default is an H100's.
    """
