"""Hides credentials outside of addresses in texts such as a library's error.

They are known by three signs: the environment has the value in a variable that is named like a
secret; a name before the value says so (`HF_TOKEN=...`, `Authorization: ...`); or the value has the
form of a well-known token. Words such as "token ids" and `max_tokens=5` have none of them.
In doubt a value is hidden, but a plain word or a number below 8 characters is kept where its name
alone (`TOKEN`, `KEY`) does not say that it is a secret.
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
_PLAIN = r"[^\s'\"\\,;&(){}\[\]<>]"
_GOES_ON = rf"(?:{_PLAIN}|[,;&](?=[\w@#$%^*!+-])(?![\w.-]{{1,40}}=))"
_VALUE = (
    rf"{_PLAIN}(?:{_GOES_ON}"
    r"|[(){}\[\]<>'\"](?=[A-Za-z0-9])|\\(?![nrtux'\"\\]))*"
)
"""A value without quotes; a comma, a bracket or the like ends it unless it goes on behind it."""
_OPEN = r"[bu]?(?P<quote>\\{0,3}['\"])"
_QUOTED = r"(?:\\(?P=quote)|(?!(?P=quote))[^\n])+"
_CLOSE = r"[\\'\"]{0,4}\]?[ \t]{0,8}"
"""What may be between a name and its `=` or `:`."""
_EQUALS = rf"{_CLOSE}:?=>?(?!=)[ \t]{{0,8}}"
_COLON = rf"{_CLOSE}:[ \t]{{0,8}}"
_END = rf"[.:!?]{{0,3}}(?!{_GOES_ON})"
_ABSENT = rf"(?:None|null|true|false|True|False){_END}"
_SHORT = rf"(?:{_ABSENT}|(?:[A-Za-z_-]{{1,7}}|[0-9]{{1,7}}){_END}|[<\[])"
"""A plain word or a number that is too short for a secret, or a special token of a model."""
_PROSE = rf"(?:{_SHORT}|[A-Za-z][a-z]{{0,14}}{_END}|https?://)"
"""What follows a colon in a sentence."""
_NO_TOKEN = (
    rf"(?!(?!https?://|\d{{1,9}}\.\d)(?={_PLAIN}{{8}})(?:(?={_PLAIN}{{0,99}}[0-9]){_PLAIN}{{0,99}}[A-Za-z]"
    rf"|{_PLAIN}{{0,99}}[a-z][A-Z]|{_PLAIN}{{20}}))"
)
"""What has not the look of a secret: a word in a tokenizer's or a model's output."""
_KEYS = "(?:api|access|account|secret|private|signing|encryption|master|subscription)[_-]?key"
_SECRETS = f"(?i:passw(?:or)?d|passphrase|secret|{_KEYS}(?:[_-]?id)?)"
_MAYBE = "(?<![A-Z0-9])(?:TOKEN|KEY|PASS|PWD|CREDENTIALS?)"
_TOKEN = "(?:[Tt]oken|(?<![a-z])credentials?)"  # nosec B105: a name, not a value
_NAMED = tuple(
    re.compile(rf"({name}{sign})(?!{kept}){value}")
    for name, *rest in (
        (_SECRETS, _ABSENT, _PROSE, r"(?!)"),
        (_MAYBE, _SHORT, _PROSE, _SHORT),
        (_TOKEN, _NO_TOKEN, _NO_TOKEN, _NO_TOKEN),
    )
    for sign, kept, value in zip(
        (_EQUALS, _COLON, f"(?:{_EQUALS}|{_COLON}){_OPEN}"),
        rest,
        (_VALUE, _VALUE, _QUOTED),
        strict=True,
    )
)
"""For each list of names: what is kept after `=`, after a colon, and between quotes."""
_FLAGS = re.compile(
    rf"((?<![\w-])--(?:[a-z]{{1,20}}[_-]){{0,3}}(?:token|secret|passw(?:or)?d|pass|credentials?|{_KEYS})"
    rf"(?:=|['\"]?,?[ \t]{{1,3}})['\"]?)(?!-|{_SHORT}){_VALUE}"
)
_SCHEME = "(?:bearer|basic|token|digest|negotiate|apikey|aws4-hmac-sha256)"
_HEADERS = re.compile(
    r"(?<![\w-])((?:(?:(?:proxy-)?(?P<prose>authorization)|(?P<key>api-key)"
    r"|x-(?:[a-z]{1,20}-){0,3}(?:key|token)|private-token)"
    rf"{_CLOSE}[:=](?!=)[ \t]{{0,8}})(?:[bu]?[\\'\"]{{1,4}}|(?={_SCHEME}\s)|(?!(?-i:{_PROSE}))"
    r"|(?(prose)(?!)|(?(key)(?!)))))"
    rf"(?:{_SCHEME}\s+[\\'\"]{{0,4}})?{_PLAIN}+(?:(?<==)\"[^\"\n]*\")?"
    r"(?:,\s?[\w-]+=[^\s,'\"]+|,\s?[\w-]+=\"[^\"\n]*\")*",
    re.IGNORECASE,
)
_COOKIES = re.compile(
    rf"(?<![\w-])((?:set-)?cookie{_CLOSE}[:=][ \t]{{0,8}}[bu]?[\\'\"]{{0,4}})"
    r"(?=[\w!#$%&*+.^`|~-]{1,99}=(?!=))[^'\"\n\\]+",
    re.IGNORECASE,
)
_SCHEMES = re.compile(
    r"((?<!\w)(?:[Bb]earer|BEARER)\s{1,8}[\\'\"]{0,4})"
    r"(?:(?=[a-z]{0,15}[^a-z\s'\"\\<>.,:;!?)\]}])[\w.~+/=-]{6,}|[\w.~+/=-]{16,})"
)
_BASIC = re.compile(
    r"((?<!\w)Basic\s{1,8}[\\'\"]{0,4})"
    r"(?=[A-Za-z+/]{0,40}[0-9=]|[A-Za-z]{0,40}[a-z][A-Z])[\w+/]{12,}={0,2}"
)
_TOKENS = re.compile(
    r"(?:(?<![A-Za-z0-9_])|(?<=\\[nrt])|(?<=[\[;]\dm)|(?<=[\[;]\d\dm))(?:"
    r"hf_[A-Za-z0-9]{16,}|hf_oauth_[\w.-]{16,}|gsk_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|npm_[A-Za-z0-9]{30,}|dckr_[op]at_[\w-]{16,}"
    r"|sk-(?=(?:\w{1,20}-){0,4}(?=[A-Za-z_]{0,60}[0-9])\w{12})[\w-]{16,}"
    r"|(?:nvapi|glpat|xox[abprs])-(?=[a-z_-]{0,99}[A-Z0-9])[\w-]{16,}"
    r"|pypi-(?=[a-z_-]{0,99}[A-Z0-9])[\w-]{32,}"
    r"|wrpo-(?=[a-z0-9_-]{0,42}[A-Z])[\w-]{43}(?![\w-])"
    r"|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}"
    r"|(?:(?<!-)eyJ[\w-]{8,}|eyJ[\w-]{8,200})\.[\w-]{8,}(?:\.[\w-]*)?)"
)
_PEM = re.compile(
    r"(-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY-----)"
    r"(?:(?!-----END)[\s\S])+"
)


def hide_credentials(text: str) -> str:
    """Return a text without the credentials that it quotes."""
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    for pattern in (_PEM, _COOKIES, _HEADERS, _SCHEMES, _BASIC, _FLAGS, *_NAMED):
        text = pattern.sub(_after_name, text)
    return _TOKENS.sub(HIDDEN, text)


def _after_name(found: re.Match[str]) -> str:
    return f"{found[1]}{HIDDEN}"


def _of_environment() -> list[str]:
    """Return the lines of the values of variables that are named like secrets, longest first."""
    values = [value for name, value in os.environ.items() if SECRET_NAME.search(name)]
    lines = {line.strip() for value in values for line in value.splitlines()}
    return sorted((line for line in lines if len(line) >= SHORTEST), key=len, reverse=True)
