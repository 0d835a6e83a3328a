"""Content fingerprints: hashes of model folders and data files."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from wrpo_ray.storage.folder import HUB_SCHEME, Folder

WHOLE = 64 * 2**20
"""Files up to this many bytes are hashed whole; larger ones by their size and samples."""
SAMPLES, SAMPLE = 64, 2**20
TEMPLATE = "chat_template.jinja"


def model_fingerprint(folder: Folder) -> str:
    """Return 16 hex digits over the files of a model folder, or the commit of a model on the hub.

    Of weights of many GB the size and 64 samples of 1 MiB are hashed, which any training step
    changes; reading them whole would take minutes at every start.
    """
    if folder.uri.startswith(HUB_SCHEME):
        return folder.uri.partition("@")[2]
    names = [n for n in folder.files() if not n.startswith(".")]
    found = digest([[name, _digest(folder / name, _samples)] for name in names], 16)
    return distinguish_bom(found, folder / TEMPLATE) if TEMPLATE in names else found


def distinguish_bom(key: str, template: Folder) -> str:
    """Return the key of a result with a chat template, changed if that has a byte-order mark.

    Earlier versions made such a mark part of every prompt; their results are not used again.
    """
    with template.filesystem.open_input_file(template.path) as stream:
        return digest([key, "unmarked"], 16) if stream.read(3) == codecs.BOM_UTF8 else key


def data_fingerprint(uris: Iterable[str]) -> str:
    """Return 16 hex digits over data files, so that an edited file is a new input.

    Files of a data set on the hub are known by its commit, which is in their addresses.
    """
    uris = list(uris)
    if all(uri.startswith(HUB_SCHEME) for uri in uris):
        return digest(uris, 16)
    files = [Folder(uri) for uri in uris]
    return digest([[str(f).rsplit("/", 1)[-1], _digest(f, _whole)] for f in files], 16)


def _digest(file: Folder, parts: Callable[[pa.NativeFile], Iterable[bytes]]) -> str:
    with file.filesystem.open_input_file(file.path) as stream:
        sha = hashlib.sha256(str(stream.size()).encode())
        for part in parts(stream):
            sha.update(part)
    return sha.hexdigest()


def _whole(stream: pa.NativeFile) -> Iterable[bytes]:
    while part := stream.read(16 * SAMPLE):
        yield part


def _samples(stream: pa.NativeFile) -> Iterable[bytes]:
    size = stream.size()
    if size <= WHOLE:
        yield from _whole(stream)
        return
    for index in range(SAMPLES):
        stream.seek(index * (size - SAMPLE) // (SAMPLES - 1))
        yield stream.read(SAMPLE)


_AS_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode
"""Made once: `json.dumps` makes an encoder for each call."""


def digest(value: Any, length: int = 32) -> str:
    """Return the first `length` hex digits of the SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(_AS_JSON(value).encode()).hexdigest()[:length]


def unit_interval(*parts: Any) -> float:
    """Return a hash of `parts` as a number in [0, 1), for splits, limits and ties."""
    return int(digest(parts, 13), 16) / 16**13


def unit_intervals(texts: Iterable[bytes]) -> list[float]:
    """Return the same of each tuple of parts, given as the JSON that `digest` hashes."""
    hashes = (hashlib.sha256(text).digest() for text in texts)
    return [(int.from_bytes(found[:7]) >> 4) / 16**13 for found in hashes]
