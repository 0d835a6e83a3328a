"""How large the JSON of a request may be, so that reading and checking it stays cheap."""

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

MAX_CONTAINERS = 10_000
"""Objects and lists of a body. They cost most: a body of 1 MB can have 333,000."""
BRACKET = re.compile(
    rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+([\[\]{}])', re.DOTALL
)
"""Up to the next bracket outside of texts. Possessive, so that a body is read once."""


def load_json(data: bytes, levels: int) -> Any:
    """Parse JSON; what is too deep or has too many parts is not parsed.

    Raises:
        ValueError: a predicate, such as "is not valid JSON in UTF-8".
    """
    depth = count = at = 0
    while found := BRACKET.match(data, at):
        at, is_open = found.end(), found[1] in b"[{"
        depth += 1 if is_open else -1
        count += is_open
        if depth > levels:
            raise ValueError(f"has more than {levels} levels")
        if count > MAX_CONTAINERS:
            raise ValueError(f"has more than {MAX_CONTAINERS} objects and lists")
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError:
        raise ValueError("is not valid JSON in UTF-8") from None


# --- grammars --------------------------------------------------------------------------------

MAX_GRAMMAR = 100_000
"""Keys, items and characters of all schemas of a request."""
MAX_CHOICES = 1_000
"""Values of all `enum`s, as at OpenAI."""
MAX_PROPERTIES = 5_000
"""Properties of all objects, as at OpenAI."""
MAX_PATTERNS = 32
MAX_PATTERN = 1_000
"""Characters of a regular expression, or of a grammar."""
MAX_EXPANSION = 2_000
"""Parts of all regular expressions of a request, each repeated as often as its counts allow:
`((a{9}){9}){9}` has 729."""
MAX_COUNT = 10_000
"""The largest `maxLength`, `maxItems` and the like."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
PATTERNS = ("pattern", "grammar")
"""Keys of regular expressions and grammars, in schemas and in vLLM's structural tags."""
PART = re.compile(
    r"""\\u\{\w*\}?|\\. | \[\^?\]?(?:\\.|[^\]\\])*+\]? | \(\??[:=!]? | \)
    | \{(?P<least>\d*),?(?P<most>\d*)\} | .""",
    re.DOTALL | re.VERBOSE,
)
"""A part of a regular expression: an escape, a class, a parenthesis, a count, or a character."""


def expansion(pattern: str) -> int:
    """Return the parts of a regular expression if each is repeated as often as its counts allow."""
    sums, last = [0], 0  # of the open groups; of the part before, which a count multiplies
    for part in PART.finditer(pattern):
        if part[0][0] == "(":
            sums.append(0)
            last = 0
            continue
        if part["least"] is not None:
            times = max(int(n[:9] or 0) for n in part.group("least", "most"))
            sums[-1] += last * max(times - 1, 0)
            last = min(last * max(times, 1), 10**9)
            continue
        last = sums.pop() if part[0] == ")" and len(sums) > 1 else 1
        sums[-1] += last
    return sum(sums)


@dataclass
class _Sizes:
    """The sizes of schemas."""

    total: int = 0
    choices: int = 0
    properties: int = 0
    count: float = 0
    patterns: list[str] = field(default_factory=list)

    def add(self, node: dict[str, Any] | list[Any]) -> None:
        """Add a node, without those below it."""
        self.total += len(node)
        if self.total > MAX_GRAMMAR:
            return
        texts = [*node, *node.values()] if isinstance(node, dict) else node
        self.total += sum(len(text) for text in texts if isinstance(text, str))
        if isinstance(node, dict):
            choices, properties, keyed = map(node.get, ("enum", "properties", "patternProperties"))
            self.choices += len(choices) if isinstance(choices, list) else 0
            self.properties += len(properties) if isinstance(properties, dict) else 0
            self.patterns += keyed if isinstance(keyed, dict) else ()
            self.patterns += [node[key] for key in PATTERNS if isinstance(node.get(key), str)]
            counts = [node[key] for key in COUNTS if isinstance(node.get(key), int | float)]
            self.count = max(self.count, *counts, 0)

    def fault(self) -> str | None:
        """Return what is too large."""
        longest = max(map(len, self.patterns), default=0)
        for number, most, what in (
            (self.total, MAX_GRAMMAR, "keys, items and characters"),
            (self.choices, MAX_CHOICES, "values of `enum`"),
            (self.properties, MAX_PROPERTIES, "properties"),
            (self.count, MAX_COUNT, "for a length or a number of items"),
            (len(self.patterns), MAX_PATTERNS, "patterns"),
            (longest, MAX_PATTERN, "characters in a pattern"),
        ):
            if number > most:
                return f"has more than {most} {what}"
        return None


def grammar_fault(trees: list[Any]) -> str | None:
    """Return why the schemas of a request are too large for a grammar; None if they are not.

    What is within these bounds may still be costly: `grammars` limits the compilation itself.
    """
    sizes, open_nodes = _Sizes(), list(trees)
    while open_nodes and sizes.total <= MAX_GRAMMAR:
        node = open_nodes.pop()
        sizes.add(node)
        if sizes.total <= MAX_GRAMMAR:
            items = node.values() if isinstance(node, dict) else node
            open_nodes += [item for item in items if isinstance(item, dict | list)]
    if fault := sizes.fault():
        return fault
    if sum(map(expansion, sizes.patterns)) > MAX_EXPANSION:
        return f"has patterns that repeat more than {MAX_EXPANSION} parts"
    return None
