"""Sections for the choice of y_ws, y_wt and y_l."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    model_validator,
)

from wrpo_ray.config.base import ImportPath, Section


class AnswersConfig(Section):
    """Which sampled answers may be chosen or rejected; the score of every answer is kept.

    What falls under several of these counts as the first of them.
    """

    empty: Literal["keep", "drop"] = "drop"
    """Answers without any visible character: there is nothing in them to learn."""
    refusals: Literal["keep", "drop"] = "keep"
    """Answers that match one of `refusal_patterns`. Some prompts are rightly refused, which the
    reward can tell and a pattern cannot."""
    refusal_patterns: tuple[str, ...] = (
        r"^\s*(i'm |i am )?(very |really |so )?sorry,? (but )?(i|as an ai)\b",
        r"^\s*(i apologi[sz]e|my apologies|unfortunately)\b[^.!?\n]{0,40}"
        r"\bi('m| am)? (can't|cannot|can not|unable|not able|won't|will not)\b",
        r"^\s*i('m| am)? (can't|cannot|can not|unable to|not able to|won't|will not) "
        r"(assist|help|provide|comply|answer|create|generate|write|discuss|fulfil)",
        r"^\s*as an ai( language)?( model| assistant)?,? i",
    )
    """Regular expressions (RE2) of refusals, searched in the answer regardless of case, with
    curly apostrophes read as straight ones. These are English, and hold an answer's start."""
    cut_off: Literal["keep", "reject_only", "drop"] = "reject_only"
    """Answers cut off at `max_tokens`. As y_ws or y_wt they would teach to leave off anywhere; as
    y_l they show what the target really does. Imported answers do not tell."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Answers of the same model with the same text to a prompt, but for the first. Where equal
    texts have equal rewards they only win more ties."""


class ContaminationConfig(Section):
    """Training prompts that share text with the prompts of `evaluate`."""

    action: Literal["drop", "report", "off"] = "report"
    """`report` measures and counts them; `drop` also leaves them out of SFT and preferences. It
    is not the default because prompts built from one template share it."""
    ngram: int = Field(13, ge=2)
    """Consecutive words that have to be the same, regardless of case and punctuation (13: GPT-3,
    arXiv 2005.14165, appendix C); in scripts without spaces, such as Chinese or Thai, consecutive
    letters. A shorter prompt counts as a whole."""


class PairConfig(Section):
    """How candidates become preference rows."""

    policy: Literal["wrpo", "fusechat3"] = "wrpo"
    """`wrpo`: y_ws is the best answer of all sources, y_wt and y_l are the best and the worst of
    the target's own. `fusechat3` (arXiv 2503.04222): chosen and rejected are the best and the worst
    of one source, the one whose best is best; the row has the chosen answer as both y_ws and
    y_wt, and trains by DPO (`wrpo.alpha.end: 0`). The target is not sampled."""
    source_below_target: Literal["keep", "drop"] = "keep"
    """What to do with a row whose y_ws scores below its y_wt."""
    min_margin: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Least reward of the better of the target's (or the source's) two answers above the worse;
    null is 0, or 0.01 for `fusechat3`. Equal rewards never make a row."""
    max_margin: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The greatest such margin; null is no bound, or 0.1 for `fusechat3`."""
    max_similarity: float | None = Field(None, ge=0, le=1)
    """Greatest likeness of these two answers: the share of character 5-grams they have in common,
    regardless of case and spacing. DPO on near-duplicates can lower both (arXiv 2402.13228).
    null only drops equal texts."""
    verifier: ImportPath | None = None
    """`module:function` called as f(messages, response, reference) -> 1.0 or 0.0. For prompts with
    a reference only right answers may then be chosen, and only wrong ones rejected."""
    contamination: ContaminationConfig = ContaminationConfig()
    """Overlap with the evaluation prompts."""

    @property
    def margins(self) -> tuple[float, float]:
        """Least and greatest margin."""
        low, high = (0.01, 0.1) if self.policy == "fusechat3" else (0.0, float("inf"))
        low = low if self.min_margin is None else self.min_margin
        return low, high if self.max_margin is None else self.max_margin

    @model_validator(mode="after")
    def _consistent(self) -> PairConfig:
        low, high = self.margins
        if high < low:
            raise ValueError(f"max_margin ({high:g}) must be at least min_margin ({low:g})")
        if self.policy == "fusechat3" and self.source_below_target == "drop":
            raise ValueError("source_below_target belongs to policy: wrpo")
        return self
