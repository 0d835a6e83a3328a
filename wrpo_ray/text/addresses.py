"""Addresses that users write: parse them, find credentials in them, and redact them.

An address is a local path, or `scheme://authority/name`. The text after its last `?` is options of
the store if it has the form `option=value&...`. Names are not escaped:
`s3://bucket/100% sure?.jsonl` is the object `100% sure?.jsonl`. This module only parses strings;
`storage.folder` opens them.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any, Self

from wrpo_ray.text.credentials import HIDDEN, hide_credentials

OPTIONS = (
    *("region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion"),
    *("allow_delayed_open", "smart_defaults", "tls_ca_file_path", "tls_ca_dir_path"),
    *("tls_verify_certificates", "retry_limit_seconds", "project_id", "enable_tls", "tenant_id"),
    *("client_id", "credential_kind", "background_writes", "blob_storage_authority"),
    *("dfs_storage_authority", "replication", "buffer_size", "default_block_size", "kerb_ticket"),
)
"""Options of pyarrow that an address may have; none is a credential."""
OPTIONS_MARK = "?&"
"""Begins the options, even if there are none, after a name that looks as if it had some."""
_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*)://"
_ONE = r"\s*[\w.-]+\s*=[^&]*"
_LIST = rf"{_ONE}(&{_ONE})*"
_GIVEN = re.compile(rf"&({_LIST})?|{_LIST}")
_LIKE_OPTION = re.compile(r"\?(?:.*&)?\s*([\w.-]+)\s*=", re.DOTALL)
_STORES = "s3|gs|gcs|abfss?|hdfs|viewfs|https?"
_MISTYPED = re.compile(rf"(?:\w+:/?|//)[^/\s]*:[^/\s]*@|(?:{_STORES}):/?[^\s/].*@", re.IGNORECASE)
"""A local path that looks like an address with credentials and a mistyped `://`."""
_WRAPPED = re.compile(rf"[^\w/.~]+{_SCHEME}")
"""A local path that begins like an address after white space, a quote or the like."""
_REST = r"(?:[?&]\s*[\w.-]+\s*=|[^\s'\"<>])*"
_NAMED = r"[a-z][a-z0-9+-]{0,30}://"
"""With a bound, so that a long word is not looked through from each of its letters."""
_IN_TEXT = re.compile(
    r"(?:(?:s3|gs|gcs)://[^\s'\"<>/@]*:"
    rf"|{_NAMED}(?!\[)[^\s'\"<>/@]*:(?!\d{1, 5}(?!\w)))"  # not followed by a port,
    rf"(?=\S)(?:(?!://)[^\n])*@{_REST}"  # but by a key of any characters
    rf"|{_NAMED}{_REST}",
    re.IGNORECASE,
)
_MISTYPED_IN_TEXT = re.compile(
    r"(?<![\w/:])(?:\w+:/?|//)[^\s/'\"<>]*:[^\s/'\"<>]*@[^\s'\"<>]*"
    rf"|(?<!\w)(?:{_STORES}):/?[^\s/'\"<>][^\n]*@[^\s'\"<>]*",
    re.IGNORECASE,
)
_WITH_USER = {"abfs", "abfss", "hdfs", "viewfs", "hf"}
"""Schemes whose authority may have a container, user or name before its `@`."""
_BUCKETS = {"s3", "gs", "gcs"}
_SERVICES = {"http", "https", "ray"}
_CREDENTIALS = (
    "the address holds credentials, which would be seen in logs, reports and job lists; take them "
    "out, and set them in the environment of every node (such as AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY) or give the machines a role"
)


@dataclass(frozen=True)
class Address:
    """The parts of `scheme://authority/name?options`."""

    scheme: str
    authority: str
    name: str
    """Begins with the slash after the authority."""
    options: str

    @classmethod
    def of(cls, text: str) -> Self | None:
        """Parse an address; None for a local path."""
        found = re.match(_SCHEME, text)
        if not found or found[1].lower() == "file":
            return None
        base, mark, options = text[found.end() :].rpartition("?")
        if not mark or not _GIVEN.fullmatch(options):
            base, options = text[found.end() :], ""
        authority, slash, name = base.partition("/")
        return cls(found[1].lower(), authority, slash + name, options)

    def __str__(self) -> str:
        """The address without options and credentials."""
        authority, name = self.authority.rpartition("@")[2], self.name
        if self._is_split_secret:
            return f"{self.scheme}://{HIDDEN}"
        if self._like_option:
            name = name.partition("?")[0] + HIDDEN
        if self.scheme in _WITH_USER and not self._has_credentials:
            authority = self.authority
        if self.scheme in _SERVICES:
            name = name.partition("?")[0]
        return f"{self.scheme}://{authority}{name}"

    @property
    def whole(self) -> str:
        """The address as a text that `of` parses."""
        base, given = f"{self.scheme}://{self.authority}{self.name}", self.options.lstrip("&")
        if _LIKE_OPTION.search(self.name) or self.name.endswith(OPTIONS_MARK):
            return f"{base}{OPTIONS_MARK}{given}"
        return f"{base}?{given}" if given else base

    @property
    def problem(self) -> str | None:
        """Why the address is rejected, without its secrets; None if it is valid."""
        if self.scheme in _SERVICES:
            return self._problem_of_service
        values = [part.partition("=") for part in self.options.split("&")]
        strange = [name for name, is_set, _ in values if is_set and name not in OPTIONS]
        if self._has_credentials or any("@" in value for _, _, value in values):
            return _CREDENTIALS
        if strange := strange or self._like_option:
            return (
                f"the address has the option {_option(strange[0])}, and a store's are "
                f"{', '.join(OPTIONS[:3])} and others of pyarrow; credentials are for the "
                f"environment of every node (such as AWS_ACCESS_KEY_ID), and a name with such a "
                f"part ends with {OPTIONS_MARK}"
            )
        return None

    @property
    def _problem_of_service(self) -> str | None:
        is_more = "@" in self.authority or self.options or re.search("[?#]", self.name)
        if not is_more and not self._is_split_secret:
            return None
        return (
            "the address holds more than host and path; a key belongs to `key_env`, a cluster's "
            "token to RAY_AUTH_TOKEN"
        )

    @property
    def _like_option(self) -> list[str]:
        """Parts of the name that look like options, unless `OPTIONS_MARK` ends the name."""
        is_marked = self.options.startswith("&")
        return [] if is_marked else _LIKE_OPTION.findall(self.name)

    @property
    def _has_credentials(self) -> bool:
        user, at, _ = self.authority.rpartition("@")
        if self._is_split_secret or ":" in user:
            return True
        is_public = self.scheme in _WITH_USER or user == "anonymous"
        return bool(at) and not is_public

    @property
    def _is_split_secret(self) -> bool:
        """Whether a slash inside a secret, or one too many, ends the authority before its `@`."""
        if not self.authority:
            is_there = ":" in self.name or self.scheme not in _WITH_USER  # hdfs: host is optional
            return is_there and "@" in self.name
        _, colon, port = self.authority.rpartition("@")[2].partition(":")
        is_port = port.isdigit() or "@" not in self.name
        return bool(colon) and (self.scheme in _BUCKETS or not is_port)


def _option(name: str) -> str:
    """Return an option's name for a message, or `HIDDEN` if it may be a secret."""
    close = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    is_like_one = re.fullmatch("[a-z][a-z_.-]{0,31}", name) and name not in OPTIONS
    return f"{name!r}{hint}" if is_like_one else HIDDEN


def address_problem(text: str) -> str | None:
    """Return why a text is rejected as an address, without its secrets; None if it is valid."""
    if found := Address.of(text):
        return found.problem
    is_hidden = _MISTYPED.match(text) or (_WRAPPED.match(text) and _redact_addresses(text) != text)
    return _CREDENTIALS if is_hidden else None


def redact(text: str) -> str:
    """Return a text, such as a library's error, without credentials and options of addresses."""
    return hide_credentials(_redact_addresses(text))


def _redact_addresses(text: str) -> str:
    text = _IN_TEXT.sub(lambda found: str(Address.of(found[0]) or found[0]), text)
    return _MISTYPED_IN_TEXT.sub(HIDDEN, text)


def without_secrets(value: Any) -> Any:
    """Return a JSON value, such as a config, without options and credentials in its addresses."""
    if isinstance(value, dict):
        return {without_secrets(name): without_secrets(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(part) for part in value]
    if not isinstance(value, str):
        return value
    if address := Address.of(value):
        return str(address)
    return HIDDEN if _MISTYPED.match(value) else _redact_addresses(value)
