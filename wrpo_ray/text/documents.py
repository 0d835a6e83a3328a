"""YAML and JSON that users write: duplicate keys are rejected; the parsers would keep the last.

YAML 1.1 reads numbers without a decimal point, such as `3e-7`, as text. They are returned as
`PlainNumber`, so that a numeric field can convert them.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, ClassVar

import yaml

FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader if installed: the Python loader takes 15 s for KubeRay's schemas."""
EXPONENT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
MERGE = "tag:yaml.org,2002:merge"
TOO_DEEP = "it is nested too deeply"
ALIASED = 50_000
"""Maximum values for which the aliases of a document stand: a few lines of aliases of aliases stand
for billions."""
TIMESTAMP = "tag:yaml.org,2002:timestamp"
COMPARED = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null", "timestamp")}
"""Tags of keys that can be written in several ways, such as 1 and 0x1."""


class DuplicateKeyError(ValueError):
    """A mapping has a duplicate key."""


class PlainNumber(str):
    """An unquoted number that YAML 1.1 reads as text, such as `3e-7`."""

    __slots__ = ()


# --- YAML ------------------------------------------------------------------------------------


def read_yaml(text: str | bytes) -> Any:
    """Return the value of a config; its numbers may be `PlainNumber`.

    Raises:
        yaml.YAMLError: the text is not a YAML document.
        DuplicateKeyError: names the duplicate keys and their lines.
    """
    return _read(text, _Loader, yaml.load)


def read_document(text: str | bytes) -> Any:
    """Return the value of another program's YAML document. Raises the errors of `read_yaml`."""
    return _read(text, _QuickLoader, yaml.load)


def read_documents(text: str | bytes) -> list[Any]:
    """Return the values of all documents of such a file. Raises the errors of `read_yaml`."""
    documents: list[Any] = _read(text, _QuickLoader, lambda *given: list(yaml.load_all(*given)))
    return documents


def _read(text: str | bytes, loader: type, read: Callable[..., Any]) -> Any:
    try:
        return read(text, loader)
    except RecursionError:
        raise yaml.YAMLError(TOO_DEEP) from None
    except (ValueError, OverflowError) as error:  # such as the date 2020-13-45
        if isinstance(error, DuplicateKeyError):
            raise
        raise yaml.YAMLError(str(error)) from None


def describe_yaml_error(error: Exception) -> str:
    """Return the problem and its position in one line, without the text around it."""
    if isinstance(error, RecursionError):
        return TOO_DEEP
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    text = " ".join(str(problem or error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else text


class _Checked:
    """A mixin for loaders that rejects duplicate keys at any depth, and aliases of too much."""

    def get_node(self) -> Any:
        return _checked(super().get_node())  # type: ignore[misc]

    def get_single_node(self) -> Any:
        return _checked(super().get_single_node())  # type: ignore[misc]


class _Loader(_Checked, yaml.SafeLoader):
    """The loader of configs."""


class _QuickLoader(_Checked, FAST_LOADER):  # type: ignore[misc]
    """The fast loader of manifests; dates stay texts, as in Kubernetes."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _plain_number(loader: Any, node: Any) -> PlainNumber:
    return PlainNumber(loader.construct_scalar(node))


_Loader.add_implicit_resolver("!plain-number", EXPONENT, list("-+.0123456789"))
_Loader.add_constructor("!plain-number", _plain_number)


def _checked(root: Any) -> Any:
    """Return the node of a document.

    Raises:
        DuplicateKeyError: a mapping has a duplicate key.
        yaml.YAMLError: aliases stand for too much.
    """
    found = [text for node in _mappings(root) for text in _duplicates(node)]
    if found:
        raise DuplicateKeyError("; ".join(found))
    sizes: dict[int, int] = {}
    whole = _size(root, sizes)
    written = 1 + sum(len(_parts_of(node)) for node in _collections(root))
    if whole - written > ALIASED:
        text = f"its aliases stand for more than {ALIASED} values"
        raise yaml.YAMLError(f"{text}; write out what it needs, without aliases of aliases")
    return root


def _size(node: Any, sizes: dict[int, int]) -> int:
    """Return the values below a node, those of an alias each time; a circle is counted once."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = 0
        sizes[id(node)] = 1 + sum([_size(part, sizes) for part in _parts_of(node)])
    return sizes[id(node)]


def _mappings(root: Any) -> Iterator[yaml.MappingNode]:
    return (node for node in _collections(root) if isinstance(node, yaml.MappingNode))


def _collections(root: Any) -> Iterator[yaml.CollectionNode]:
    """Yield all mappings and lists below a node, each once, even if it has aliases."""
    seen, queue = set(), deque([root])
    while queue:
        node = queue.popleft()
        if isinstance(node, yaml.CollectionNode) and id(node) not in seen:
            seen.add(id(node))
            yield node
            queue += _parts_of(node)


def _parts_of(node: yaml.CollectionNode) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value)


def _duplicates(node: yaml.MappingNode) -> Iterator[str]:
    lines: dict[Hashable, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # the constructor rejects a mapping or list as a key
        line, same = key.start_mark.line + 1, _key(key)
        if same in lines:
            where = f"lines {lines[same]} and {line}" if lines[same] < line else f"line {line}"
            remedy = "write `<<: [*a, *b]`" if key.tag == MERGE else "keep one of them"
            yield f"the key {key.value!r} is given twice, in {where}; {remedy}"
        lines.setdefault(same, line)


def _key(node: yaml.ScalarNode) -> Any:
    """The value of a key, which several ways to write it share."""
    if node.tag not in COMPARED:
        return node.value
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.YAMLError, ValueError):
        return node.value


# --- JSON ------------------------------------------------------------------------------------


def read_json(text: str | bytes, parse_float: Callable[[str], Any] = float) -> Any:
    """Return the value of a JSON text; `parse_float` converts numbers with a point or exponent.

    Raises:
        ValueError: the text is not JSON, or an object has a duplicate key.
    """
    return json.loads(text, object_pairs_hook=_object, parse_float=parse_float)


def read_row(
    text: str | bytes, columns: Iterable[str], parse_float: Callable[[str], Any] = float
) -> Any:
    """Return the value of a line of JSON, of which only these columns are used.

    Raises:
        ValueError: the line is not JSON, or it or one of the columns has a duplicate key.
    """
    twice: list[tuple[dict[str, Any], DuplicateKeyError]] = []

    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return _object(pairs)
        except DuplicateKeyError as error:
            twice.append((dict(pairs), error))
            return twice[-1][0]

    row = json.loads(text, object_pairs_hook=read, parse_float=parse_float)
    if twice:
        inside = [row[name] for name in columns if name in row] if isinstance(row, dict) else []
        used = {id(row), *(id(part) for value in inside for part in _parts(value))}
        if error := next((error for found, error in twice if id(found) in used), None):
            raise error
    return row


def _parts(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all values in it."""
    queue = deque([value])
    while queue:
        yield (part := queue.popleft())
        queue += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKeyError(f"the key {twice!r} is given twice")
    return found
