"""Models of the Hugging Face hub: ids, commits of revisions, and their files on a node.

Its data sets are in `hub_data`, with the same errors.

huggingface_hub talks to the hub, and reads the token from the environment (HF_TOKEN); nothing here
sees it. The driver resolves a revision once; from then on a model is identified by its commit. A
complete model in the user's own cache (HF_HOME) is used in place and never evicted.
"""

import glob
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from wrpo_ray.errors import UserError
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.folder import HUB_SCHEME
from wrpo_ray.storage.remote import (
    ARRIVING,
    GIT,
    MAX_STREAMS,
    Listed,
    hasher,
    pieces_of,
    put_in_place,
)
from wrpo_ray.storage.weight_files import engine_files, weight_files

ID = re.compile(
    rf"(?P<scheme>{HUB_SCHEME})?(?P<repo>\w[\w.-]*/[\w.-]+)(?(scheme)(?:@(?P<at>[\w.-]+))?)"
)
"""`org/name`, `hf://org/name` or `hf://org/name@revision`."""
DATASETS = "datasets/"
"""Begins the name of a data set's repository, where a model's is `org/name`."""
Pins = dict[str, str]
"""{repository@revision: commit}"""


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at one commit; a source of the node cache (`remote.Source`)."""

    repo: str
    commit: str

    @classmethod
    def at(cls, uri: str) -> Self:
        """Return the model at `hf://org/name@commit`.

        Raises:
            UserError: the address has another form.
        """
        repo, _, commit = uri.removeprefix(HUB_SCHEME).partition("@")
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise UserError(
                f"{uri}: not a model at a commit, such as {HUB_SCHEME}org/name@<40 digits>"
            )
        return cls(repo, commit)

    @property
    def uri(self) -> str:
        """The address."""
        return f"{HUB_SCHEME}{self.repo}@{self.commit}"

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    @property
    def key(self) -> str:
        """The key of its copies in node caches."""
        return uuid.uuid5(uuid.NAMESPACE_URL, self.uri).hex

    def fetch_metadata(self) -> tuple[Path, list[str]]:
        """Return a folder with all that an engine needs but the weights, and all file names.

        These are some MB. If the user's own cache has the weights, the folder has them too.

        Raises:
            UserError: the hub rejects the request.
        """
        if found := self.in_users_cache():
            return found, [file.name for file in found.iterdir()]
        cache = node_cache().folder / "hub"
        with explain_errors(self.repo, self.commit):
            folder = self._download(["config.json"], cache)  # and the list of files
            tree = get_cached_repo_tree(self.repo, revision=self.commit, cache_dir=cache)
            names = [file.path for file in tree]
            small = set(engine_files(names)) - set(weight_files(names))
            self._download([glob.escape(name) for name in small], cache)
        return folder, names

    def weight_bytes(self) -> int:
        """Return the bytes of the weights, by a list of files that is here; 0 if none is.

        The check before a run has fetched it (`fetch_metadata`), so that this asks nobody.
        """
        for cache in (None, node_cache().folder / "hub"):
            with suppress(CachedRepoTreeNotFoundError):
                tree = get_cached_repo_tree(self.repo, revision=self.commit, cache_dir=cache)
                sizes = {file.path: file.size for file in tree}
                return sum(sizes[name] for name in weight_files(sizes))
        return 0

    def files(self) -> dict[str, Listed]:
        """Return the files that an engine needs, with their hashes."""
        with explain_errors(self.repo, self.commit):
            tree = HfApi().list_repo_tree(self.repo, recursive=True, revision=self.commit)
            files = {f.path: _listed(f) for f in tree if isinstance(f, RepoFile)}
        return {name: files[name] for name in engine_files(files)}

    def fetch(self, name: str, file: Listed, to: Path) -> str:
        """Download a file and verify it; one that arrived in an interrupted attempt is kept."""
        disable_progress_bars()
        with explain_errors(self.repo, self.commit):
            arrived = Path(
                hf_hub_download(self.repo, name, revision=self.commit, local_dir=to / ARRIVING)
            )
        digest = hasher(file)
        for piece in pieces_of(arrived):
            digest.update(piece)
        try:
            return put_in_place(arrived, name, file, digest, to)
        except OSError as error:
            raise OSError(f"{self}: {error} on the hub") from None

    def _download(self, patterns: list[str], cache_dir: Path) -> Path:
        disable_progress_bars()
        folder = snapshot_download(
            self.repo,
            revision=self.commit,
            allow_patterns=patterns,
            max_workers=MAX_STREAMS,
            cache_dir=cache_dir,
        )
        return Path(folder)

    def in_users_cache(self) -> Path | None:
        """The snapshot in HF_HOME, if it is complete by the list of files that is kept there."""
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


def _listed(file: RepoFile) -> Listed:
    return Listed(file.size, file.lfs.sha256 if file.lfs else f"{GIT}{file.blob_id}")


def is_hub_id(model: str) -> bool:
    """Whether a config's `model` is a hub id; an existing local folder takes precedence."""
    return ID.fullmatch(model) is not None and not os.path.isdir(model)


def resolve_address(model: str, revision: str | None, pins: Pins | None = None) -> str:
    """Return a hub id's address at its commit (`commit_of`); another `model` is returned as it is.

    Raises:
        UserError: the hub does not know the model or denies access, or a folder has a revision.
    """
    if not is_hub_id(model):
        if revision is not None:
            raise UserError(f"revision: {model} is a folder; only a hub id (org/name) has one")
        return model
    match = ID.fullmatch(model)
    assert match is not None
    revision = one_revision(model, match["at"], revision)
    return HubModel(match["repo"], commit_of(match["repo"], revision, pins)).uri


def one_revision(address: str, at: str | None, revision: str | None) -> str | None:
    """Return the revision of an address, which may be after its `@` or in the field.

    Raises:
        UserError: both are given, and differ.
    """
    if at is not None and revision not in (None, at):
        raise UserError(f"revision: {address} has one already; drop it, or {revision!r}")
    return at or revision


def commit_of(repo: str, revision: str | None, pins: Pins | None = None) -> str:
    """Return the commit of a repository's revision: of `pins`, or the current one, added to them.

    Without a network a commit is used as it is, and a branch or tag at the last known commit.

    Raises:
        UserError: the hub does not know the repository or revision, or denies access.
    """
    pins = {} if pins is None else pins
    request = f"{repo}@{revision or constants.DEFAULT_REVISION}"
    if request not in pins:
        name, kind = repo.removeprefix(DATASETS), "dataset" if repo.startswith(DATASETS) else None
        with explain_errors(repo, revision):
            found = HfApi().resolve_revision(name, repo_type=kind, revision=revision)
        pins[request] = found.resolved
    return pins[request]


@contextmanager
def explain_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub into a UserError of one line with the remedy."""
    is_data = repo.startswith(DATASETS)
    try:
        yield
    except GatedRepoError:
        problem = (
            f"is gated; accept its licence on {constants.ENDPOINT}/{repo}, and set HF_TOKEN, on "
            f"every node, to a token of the account that did"
        )
    except RepositoryNotFoundError:
        lack, key = (
            ("no data set that", "path")
            if is_data
            else ("no such folder, and no model that", "model")
        )
        problem = (
            f"{lack} {constants.ENDPOINT} shows to this account; "
            f"correct `{key}`, or set HF_TOKEN, on every node, if it is private"
        )
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r}; give a branch, tag or commit that it has"
    except (
        RevisionResolutionError,
        LocalEntryNotFoundError,
        CachedRepoTreeNotFoundError,
        OfflineModeIsEnabled,
    ) as error:
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
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = f"{constants.ENDPOINT} does not answer ({_first_line(error.__cause__ or error)})"
    wanted = repo if revision is None else f"{repo} --revision {revision}"
    if repo.startswith(DATASETS):
        wanted = f"{wanted.removeprefix(DATASETS)} --repo-type dataset --local-dir FOLDER"
        return (
            f"cannot be read while {reason}; put that right, or run `hf download {wanted}` where "
            f"there is a network, and give the folder"
        )
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
