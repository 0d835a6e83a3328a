"""Sections `answers` and `pair`: how scored answers become training rows.

y_ws is the best answer of all sources, y_wt and y_l are the best and the worst of the target's own.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from wrpo_ray.config.base import ImportPath, Section


class AnswersConfig(Section):
    """Which sampled answers may be chosen or rejected. The scores of all answers are kept.

    An answer that matches several of these policies counts under the first.

    Example:
        >>> AnswersConfig(refusals="drop").cut_off
        'reject_only'
    """

    empty: Literal["keep", "drop"] = "drop"
    """Answers without any visible character."""
    refusals: Literal["keep", "drop"] = "keep"
    """Answers that match one of `refusal_patterns`. The default keeps them, because a pattern
    cannot tell whether a prompt is rightly refused; the reward can."""
    refusal_patterns: tuple[str, ...] = (
        r"^\s*(i'm |i am )?(very |really |so )?sorry,? (but )?(i|as an ai)\b",
        r"^\s*(i apologi[sz]e|my apologies|unfortunately)\b[^.!?\n]{0,40}"
        r"\bi('m| am)? (can't|cannot|can not|unable|not able|won't|will not)\b",
        r"^\s*i('m| am)? (can't|cannot|can not|unable to|not able to|won't|will not) "
        r"(assist|help|provide|comply|answer|create|generate|write|discuss|fulfil)",
        r"^\s*as an ai( language)?( model| assistant)?,? i",
    )
    """Regular expressions (RE2) of refusals. The search ignores case and reads curly apostrophes as
    straight ones. The defaults match English refusals at the start of an answer."""
    cut_off: Literal["keep", "reject_only", "drop"] = "reject_only"
    """Answers cut off at `max_tokens`. `reject_only`: they may become y_l (the rejected answer),
    but not y_ws or y_wt (the chosen ones), which would teach the model to stop in mid-sentence. Of
    imported answers it is not known whether they were cut off."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Repeated answers: those with the same text as an earlier answer of the same model to the same
    prompt. They do no harm if equal texts have equal rewards."""


class ContaminationConfig(Section):
    """Training prompts that share text with the prompts of `evaluate` (contaminated prompts)."""

    action: Literal["drop", "report", "off"] = "report"
    """`report` counts them; `drop` also removes them from SFT and preference training. `drop` is
    not the default because prompts built from one template all share its text."""
    ngram: int = Field(13, ge=2)
    """How many consecutive words must be the same, ignoring case and punctuation (13 as for GPT-3,
    arXiv 2005.14165, appendix C). In scripts without spaces, such as Chinese or Thai, each letter
    counts as a word. A shorter prompt must match as a whole."""


class MarginConfig(Section):
    """Limits on the difference of rewards, on the scale of a group's reward."""

    min_margin: float | None = Field(None, ge=0, allow_inf_nan=False)
    """As `pair.min_margin`, which null takes."""
    max_margin: float | None = Field(None, gt=0, allow_inf_nan=False)
    """As `pair.max_margin`, which null takes."""


class PairConfig(Section):
    """How scored answers become preference rows (y_ws, y_wt, y_l).

    y_ws is the source's chosen answer, y_wt the target's chosen answer, y_l the rejected answer.

    Example:
        >>> PairConfig(min_margin=0.05).policy
        'wrpo'
    """

    policy: Literal["wrpo", "fusechat3"] = "wrpo"
    """`wrpo`: y_ws is the best answer of all sources; y_wt and y_l are the best and the worst of
    the target's own answers. `fusechat3` (arXiv 2503.04222): the chosen and the rejected answer are
    the best and the worst of one source, the one with the best answer of all. The chosen answer is
    stored as both y_ws and y_wt, for training by DPO (`wrpo.alpha.end: 0`). The target is not
    sampled."""
    source_below_target: Literal["keep", "drop"] = "keep"
    """Whether to keep rows whose y_ws has a lower reward than y_wt. Only for `policy: wrpo`."""
    min_margin: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Least difference of the rewards of y_wt and y_l; null means 0, or 0.01 for `fusechat3`. Equal
    rewards never make a row."""
    max_margin: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Greatest difference of these rewards; null means no limit, or 0.1 for `fusechat3`."""
    by_group: dict[str, MarginConfig] = {}
    """Other limits for groups of prompts (`prompts.columns.group`), whose rewards have scales of
    their own."""
    max_similarity: float | None = Field(None, ge=0, le=1)
    """Greatest similarity of y_wt and y_l: the share of character 5-grams that they have in common
    (Jaccard index), ignoring case and spacing. DPO on near-duplicates can make both less likely
    (arXiv 2402.13228). null drops only equal texts."""
    verifier: ImportPath | None = None
    """A function `module:function`, called as f(messages, response, reference) -> 1.0 (right) or
    0.0 (wrong). For prompts with a reference, only right answers are then chosen and only wrong
    ones rejected."""
    contamination: ContaminationConfig = ContaminationConfig()
    """How to treat training prompts that overlap with evaluation prompts."""

    @property
    def margins(self) -> tuple[float, float]:
        """The least and the greatest margin of y_wt over y_l."""
        return self.margins_of(None)

    def margins_of(self, group: str | None) -> tuple[float, float]:
        """The same for the prompts of a group."""
        low, high = (0.01, 0.1) if self.policy == "fusechat3" else (0.0, float("inf"))
        for given in (self, self.by_group.get(group or "", MarginConfig())):
            low = low if given.min_margin is None else given.min_margin
            high = high if given.max_margin is None else given.max_margin
        return low, high

    def identity(self) -> dict[str, Any]:
        """As of every section; `by_group` is left out where it is empty."""
        found = super().identity()
        return found if self.by_group else {k: v for k, v in found.items() if k != "by_group"}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for group in (None, *self.by_group):
            low, high = self.margins_of(group)
            if high < low:
                of = f"by_group.{group}: " if group else ""
                raise ValueError(f"{of}max_margin ({high:g}) must be at least min_margin ({low:g})")
        if self.policy == "fusechat3" and self.source_below_target == "drop":
            raise ValueError("source_below_target belongs to policy: wrpo")
        return self
