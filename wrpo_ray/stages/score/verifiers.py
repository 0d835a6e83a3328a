"""Verifiers compare answers with the reference: same text, same number, or a program that works.

A verdict is 1.0 or 0.0. A row fails only for reasons outside the answer: a reference that is
missing or has no number, tests that are no Python, a sandbox that could not be set up.
"""

import re
import textwrap
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from wrpo_ray.config import CodeConfig, VerifierName
from wrpo_ray.stages.score.base import Item, MissingReferenceError, Outcome
from wrpo_ray.stages.score.sandbox import Sandbox

Check = Callable[[str, str], bool]
"""Whether an answer is right, given (answer, reference)."""


VERSIONS: dict[VerifierName, str] = {
    "exact": "2",
    "number": "2",
    "code": "2",
}
"""The version of each verifier in step keys. If a change alters any verdict, put another text here,
so that answers are verified again."""


class BadReferenceError(ValueError):
    """The reference contains nothing that an answer can be compared with."""


class VerifierReward:
    """Verdicts: 1.0 for an answer that the check accepts, else 0.0."""

    def __init__(self, check: Check, threads: int = 1):
        self.check, self.threads = check, threads

    def score(self, items: list[Item]) -> list[Outcome]:
        """Return one verdict or error an item, checked by `threads` threads."""
        if self.threads == 1:
            return [self._one(item) for item in items]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._one, items))

    def _one(self, item: Item) -> Outcome:
        if item.reference is None or not item.reference.strip():
            return MissingReferenceError("the prompt has no reference to compare with")
        try:
            return float(self.check(item.text, item.reference))
        except (ValueError, RuntimeError) as error:  # of the reference, of the sandbox
            return error


def load_verifier(name: VerifierName, code: CodeConfig, threads: int = 1) -> VerifierReward:
    """Return the verifier of a name; `threads` programs run at a time.

    Raises:
        UserError: programs cannot be sandboxed on this machine.
    """
    if name != "code":
        return VerifierReward({"exact": is_same, "number": has_same_number}[name])
    box = Sandbox(code).checked()
    return VerifierReward(lambda text, tests: passes(box, text, tests), threads)


# --- exact -----------------------------------------------------------------------------------


def is_same(text: str, reference: str) -> bool:
    """Whether both are the same but for case, spaces, Unicode forms and a full stop at the end."""
    return normal(text) == normal(reference)


def normal(text: str) -> str:
    """`  The  Answer. ` as `the answer`."""
    words = unicodedata.normalize("NFKC", _stream_safe(text)).casefold().split()
    return " ".join(words).removesuffix(".").rstrip()


def _stream_safe(text: str) -> str:
    """Part runs of more than 30 combining marks (UAX #15, D4); sorting a long one is quadratic."""
    if text.isascii():
        return text
    marks, parts = 0, []
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > 30:
            parts.append("\N{COMBINING GRAPHEME JOINER}")
            marks = 1
        parts.append(character)
    return "".join(parts)


# --- number ----------------------------------------------------------------------------------

_GROUPS = r"(?:(?<!\d,)\d{1,3}(?:,\d{3})++|\d{1,3}(?:,\d{3}){1,250}+)"
_DIGITS = rf"(?:{_GROUPS}(?!,?\d)|\d+)"
NUMBER = re.compile(
    r"((?<![\w)\]}])[-+](?:\s*[$€£¥]\s*)?)?"
    r"(?:\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}"
    rf"|(?<![^\W_]|_)(?<!\d\.)({_DIGITS}(?:\.\d+)?|\.\d+)"
    rf"(?:[eE]([-+]?\d{{1,3}})(?!\w))?(?:\s?/\s?({_DIGITS})(?![\d/]))?)"
)
"""1: sign; 2, 3: a LaTeX fraction; 4, 5: a decimal and its exponent; 6: what it is divided by.
Groups of three behind others are counted to 250 (LONGEST), so that it is linear."""
SPELLINGS = (("\N{MINUS SIGN}", "-"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\$", "$"))
BARE_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)")
LONGEST = 1000
"""Characters of a number; a longer one is none."""


def has_same_number(text: str, reference: str) -> bool:
    r"""Whether the answer's last number equals the reference's.

    Where there is a `#### 42` (GSM8K) or a `\boxed{42}` (MATH), the last of these decides.

    Raises:
        BadReferenceError: the reference has no number.
    """
    wanted = last_number(reference)
    if wanted is None:
        raise BadReferenceError(f"the reference has no number: {reference[:100]!r}")
    return last_number(text) == wanted


def last_number(text: str) -> Fraction | None:
    """The last number of a text; units, currency and per cent signs count for nothing.

    Not covered: mixed numbers (3 1/2), powers of ten (2 x 10^6), decimal commas, clock times.
    """
    for written, read in SPELLINGS:
        text = text.replace(written, read)
    text = BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    found = NUMBER.findall(_marked(text))
    for sign, above, below, decimal, exponent, divisor in reversed(found):
        number = _value(above or decimal, exponent, below or divisor)
        if number is not None:
            return -number if sign.startswith("-") else number
    return None


def _value(decimal: str, exponent: str, divisor: str) -> Fraction | None:
    if len(decimal) > LONGEST or len(divisor) > LONGEST:
        return None
    below = int(divisor.replace(",", "") or 1)
    above = Fraction(decimal.replace(",", "")) * Fraction(10) ** int(exponent or 0)
    return above / below if below else None


def _marked(text: str) -> str:
    """The part of a text that it marks as its result, or all of it."""
    _, mark, after = text.rpartition("####")
    if mark and NUMBER.search(after.partition("\n")[0]):
        return after.partition("\n")[0]
    _, mark, after = text.rpartition("\\boxed{")
    return _inside_braces(after) if mark else text


def _inside_braces(text: str) -> str:
    """The text up to the brace that closes one before it."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return text


# --- code ------------------------------------------------------------------------------------

BLOCK = re.compile(
    r"^[ \t]*+(`{3,}+|~{3,}+)[ \t]*+([\w+-]*+)[^\n`]*+\n(.*?)(?:^[ \t]*+\1[`~]*+[ \t]*+$|\Z)",
    re.DOTALL | re.MULTILINE,
)
"""1: the fence; 2: the language; 3: the program. Its repeats never give back, so it is linear."""
PYTHON = ("python", "python3", "py")


def passes(box: Sandbox, text: str, tests: str) -> bool:
    """Whether the answer's program passes the tests; an answer without one does not.

    Raises:
        BadTestsError: the tests are no Python.
        SandboxError: the program could not be run.
    """
    program = last_program(text)
    return program is not None and box.passes(program, tests)


def last_program(text: str) -> str | None:
    """The last fenced block that says it is Python; if none does, the last that says nothing."""
    blocks = [(language.lower(), body) for _, language, body in BLOCK.findall(text)]
    for wanted in (PYTHON, ("",)):
        found = [body for language, body in blocks if language in wanted]
        if found:
            return textwrap.dedent(found[-1])
    return None
