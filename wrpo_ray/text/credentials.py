"""Hides credentials outside of addresses in texts such as a library's error.

They are known by three signs: the environment has the value in a variable that is named like a
secret; a name before the value says so (`HF_TOKEN=...`, `Authorization: ...`); or the value has the
form of a well-known token. Words such as "token ids" and `max_tokens=5` have none of them.
"""

import os
import re

HIDDEN = "..."
SECRET_NAME = re.compile(
    "(KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASS|CREDENTIALS)(_ID)?$", re.IGNORECASE
)
"""Names of environment variables that may hold secrets."""
SHORTEST = 8
"""Minimum characters of a variable's value that is hidden wherever it is: less may be a word."""
_QUOTES = r"[\\'\"]{0,3}"
_PLAIN = r"[^\s'\"\\,;&(){}\[\]<>]"
_HEADERS = re.compile(
    rf"(?<![\w-])((?:(?:proxy-)?authorization|(?:x-)?api-key|x-auth-token){_QUOTES}\s?[:=]\s?"
    rf"(?:[bu](?=[\\'\"]))?{_QUOTES})(?:(?:bearer|basic|token|digest|negotiate|apikey|aws4-hmac-sha256)\s+)?"
    rf"{_PLAIN}+(?:(?<==)\"[^\"\n]*\")?(?:,\s?[\w-]+=[^\s,'\"]+|,\s?[\w-]+=\"[^\"\n]*\")*",
    re.IGNORECASE,
)
_SCHEMES = re.compile(
    r"(?<!\w)([Bb]earer|BEARER)\s+"
    r"(?:(?=[a-z]{0,15}[^a-z\s'\"\\<>.,:;!?)\]}])[\w.~+/=-]{6,}|[\w.~+/=-]{16,})"
    r"|(?<!\w)(Basic)\s+(?=[a-z]{0,40}[A-Z0-9+/=])[\w+/]{12,}={0,2}"
)
_NAME = (
    r"(?:(?<!\w)[A-Z][A-Z0-9_]{0,99}"
    r"(?:(?<=_TOKEN)|(?<=_KEY)|(?<=_SECRET)|(?<=PASSWORD)|(?<=PASSWD))"
    r"|(?i:(?<![a-z])(?:api_?key|secret_?(?:access_?)?key|client_?secret|password|passwd)))"
    rf"{_QUOTES}"
)
_NAMED = re.compile(
    rf"({_NAME}\s?=\s?{_QUOTES})(?!None\b|null\b){_PLAIN}+"
    rf"|({_NAME}:\s?[bu]?\\{{0,2}}['\"]){_PLAIN}[^'\"\n]*"
    rf"|({_NAME}:\s?)(?={_PLAIN}{{0,99}}[0-9]){_PLAIN}{{6,}}"
)
_TOKENS = re.compile(
    r"(?:(?<![\w-])|(?<=\\[nrt]))(?:"
    r"hf_[A-Za-z0-9]{16,}|gsk_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|(?:sk|nvapi|glpat|xox[abprs])-(?=[a-z_-]{0,99}[A-Z0-9])[\w-]{16,}"
    r"|wrpo-(?=[a-z0-9_-]{0,42}[A-Z])[\w-]{43}(?![\w-])"
    r"|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"
)


def hide_credentials(text: str) -> str:
    """Return a text without the credentials that it quotes."""
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    for pattern in (_HEADERS, _SCHEMES, _NAMED):
        text = pattern.sub(_after_name, text)
    return _TOKENS.sub(HIDDEN, text)


def _after_name(found: re.Match[str]) -> str:
    name = next(part for part in found.groups() if part is not None)
    return f"{name}{'' if found.re is not _SCHEMES else ' '}{HIDDEN}"


def _of_environment() -> list[str]:
    """Return the lines of the values of variables that are named like secrets, longest first."""
    values = [value for name, value in os.environ.items() if SECRET_NAME.search(name)]
    lines = {line.strip() for value in values for line in value.splitlines()}
    return sorted((line for line in lines if len(line) >= SHORTEST), key=len, reverse=True)
