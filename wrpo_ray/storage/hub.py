"""Models of the Hugging Face hub: ids, the commit that a revision is at, their files on a node.

huggingface_hub speaks with the hub, and takes the token from the environment (HF_TOKEN); nothing
here sees it. A revision is resolved once, on the driver; from then on a model is known by its
commit. Where the user's own cache (HF_HOME) has all of it, it is used in place and never evicted.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from wrpo_ray.errors import UserError
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.folder import HUB_SCHEME
from wrpo_ray.storage.weight_files import engine_files, weight_files

ID = re.compile(
    rf"(?P<scheme>{HUB_SCHEME})?(?P<repo>\w[\w.-]*/[\w.-]+)(?(scheme)(?:@(?P<at>[\w.-]+))?)"
)
"""`org/name`, `hf://org/name` or `hf://org/name@revision`."""
STREAMS = 8
"""Files downloaded or hashed at once."""


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at one commit: what a node's copy is made from (`cache.Source`)."""

    repo: str
    commit: str

    @classmethod
    def at(cls, uri: str) -> HubModel:
        """The model at `hf://org/name@commit`.

        Raises:
            UserError: the address is another.
        """
        repo, _, commit = uri.removeprefix(HUB_SCHEME).partition("@")
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise UserError(
                f"{uri}: not a model at a commit, such as {HUB_SCHEME}org/name@<40 digits>"
            )
        return cls(repo, commit)

    @property
    def uri(self) -> str:
        """Its address."""
        return f"{HUB_SCHEME}{self.repo}@{self.commit}"

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    def local(self) -> Path:
        """A folder on this node with all that an engine needs.

        Raises:
            UserError: the hub does not give it, or it does not fit into the node's cache.
        """
        key = uuid.uuid5(uuid.NAMESPACE_URL, self.uri).hex
        return self._in_users_cache() or node_cache().copy(key, self)

    def fetch_metadata(self) -> tuple[Path, list[str]]:
        """A folder with all that an engine needs but the weights, some MB, and all files' names.

        Where the user's own cache has the weights, they are there too.

        Raises:
            UserError: the hub does not give it.
        """
        if found := self._in_users_cache():
            return found, [file.name for file in found.iterdir()]
        cache = node_cache().folder / "hub"
        with _explained(self.repo, self.commit):
            folder = self._download(["config.json"], cache_dir=cache)  # and the list of files
            tree = get_cached_repo_tree(self.repo, revision=self.commit, cache_dir=cache)
            names = [file.path for file in tree]
            small = set(engine_files(names)) - set(weight_files(names))
            self._download([glob.escape(name) for name in small], cache_dir=cache)
        return folder, names

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that an engine needs."""
        return {name: file.size for name, file in self._files().items()}

    def fetch(self, sizes: dict[str, int], to: Path) -> None:
        """Download; files that an interrupted try finished are not fetched again."""
        with _explained(self.repo, self.commit):
            self._download([glob.escape(name) for name in sizes], local_dir=to)
        files = self._files()
        with ThreadPoolExecutor(STREAMS) as threads:
            are_whole = threads.map(lambda name: _is_whole(to / name, files[name]), sizes)
        spoilt = [name for name, good in zip(sizes, are_whole, strict=True) if not good]
        for name in spoilt:
            (to / name).unlink()  # the next try fetches it again
        if spoilt:
            raise OSError(f"{self}: {spoilt[0]} arrived with another content than the hub tells")
        shutil.rmtree(to / ".cache", ignore_errors=True)  # the downloader's notes

    def _files(self) -> dict[str, RepoFile]:
        with _explained(self.repo, self.commit):
            tree = HfApi().list_repo_tree(self.repo, recursive=True, revision=self.commit)
            files = {file.path: file for file in tree if isinstance(file, RepoFile)}
        return {name: files[name] for name in engine_files(files)}

    def _download(
        self, patterns: list[str], *, cache_dir: Path | None = None, local_dir: Path | None = None
    ) -> Path:
        disable_progress_bars()
        folder = snapshot_download(
            self.repo,
            revision=self.commit,
            allow_patterns=patterns,
            max_workers=STREAMS,
            cache_dir=cache_dir,
            local_dir=local_dir,
        )
        return Path(folder)

    def _in_users_cache(self) -> Path | None:
        """The snapshot in HF_HOME, if the list of files kept there says that it is whole."""
        try:
            tree = get_cached_repo_tree(self.repo, revision=self.commit)
            names = [glob.escape(name) for name in engine_files(file.path for file in tree)]
            return Path(
                snapshot_download(
                    self.repo, revision=self.commit, allow_patterns=names, local_files_only=True
                )
            )
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            return None


def is_hub_id(model: str) -> bool:
    """Whether a config's `model` is one: an existing local folder comes first."""
    return ID.fullmatch(model) is not None and not os.path.isdir(model)


def resolve_address(model: str, revision: str | None) -> str:
    """Where a config's model lies: of a hub id its address at the commit it is at now, else itself.

    Without a network a commit is taken as it is, and a branch or tag at the commit seen last.

    Raises:
        UserError: the hub does not know or give it, or a folder has a revision.
    """
    if not is_hub_id(model):
        if revision is not None:
            raise UserError(f"revision: {model} is a folder; only a hub id (org/name) has one")
        return model
    match = ID.fullmatch(model)
    assert match is not None
    repo, at = match["repo"], match["at"]
    if at is not None and revision not in (None, at):
        raise UserError(f"revision: {model} has one already; drop it, or {revision!r}")
    with _explained(repo, at or revision):
        commit = HfApi().resolve_revision(repo, revision=at or revision).resolved
    return HubModel(repo, commit).uri


def _is_whole(file: Path, told: RepoFile) -> bool:
    """Whether a file's hash is the hub's: SHA-256 of large files, git's of small ones."""
    with file.open("rb") as stream:
        if told.lfs is not None:
            return hashlib.file_digest(stream, "sha256").hexdigest() == told.lfs.sha256
        data = stream.read()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest() == told.blob_id


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Tells what the hub refuses in one line with the remedy."""
    try:
        yield
    except GatedRepoError:
        problem = (
            f"is gated; accept its licence on {constants.ENDPOINT}/{repo}, and set HF_TOKEN, on "
            f"every node, to a token of the account that did"
        )
    except RepositoryNotFoundError:
        problem = (
            f"no such folder, and no model that {constants.ENDPOINT} shows to this account; "
            f"correct `model`, or set HF_TOKEN, on every node, if it is private"
        )
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r}; give a branch, tag or commit that it has"
    except (RevisionResolutionError, LocalEntryNotFoundError, CachedRepoTreeNotFoundError) as error:
        problem = _unreachable(repo, revision, error)
    except HfHubHTTPError as error:
        problem = _refused(error)
    except HTTPError as error:
        problem = f"the connection to {constants.ENDPOINT} broke ({_first_line(error)}); try again"
    except HFValidationError as error:
        problem = f"no such folder, and no hub id: {error}"
    else:
        return
    raise UserError(f"{repo}: {problem}")


def _unreachable(repo: str, revision: str | None, error: Exception) -> str:
    wanted = repo if revision is None else f"{repo} --revision {revision}"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = f"{constants.ENDPOINT} does not answer ({_first_line(error.__cause__ or error)})"
    return (
        f"no such folder, and the cache does not have it as a hub id while {reason}; put that "
        f"right, run `hf download {wanted}` where there is a network, or give a folder"
    )


def _refused(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "the hub does not accept HF_TOKEN; set it, on every node, to a valid token"
    return f"the hub answers {status} ({_first_line(error)}); try again later"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)
