"""Upload of an exported folder to the Hugging Face hub, which is asked before the export's work.

It is asked only when there is something to export, as it makes the repository.

huggingface_hub finds the token (HF_TOKEN, or the login of `hf auth login`); no message shows it.
What the hub holds already is not sent again, so that a broken upload continues when it is repeated.
"""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import disable_progress_bars

from wrpo_ray.errors import UserError
from wrpo_ray.export.card_parts import CARD
from wrpo_ray.export.dataset_files import DATA, is_file
from wrpo_ray.export.model_card import gguf_name
from wrpo_ray.export.run_facts import last_name
from wrpo_ray.storage.folder import Folder
from wrpo_ray.storage.weight_files import TEMPLATES, engine_files, weight_files

PARTS = ("adapters", "base")
"""Folders of models in an export of LoRA's."""
REFUSED = (401, 403, 404)
"""Statuses of a token that is not valid, or may not write, or not see a private repository."""


@dataclass(frozen=True)
class Push:
    """A repository of the hub that an export is uploaded to."""

    repo: str
    """org/name"""
    kind: str
    """`model` or `dataset`."""
    is_public: bool = False

    def check(self, to: str) -> None:
        """Check what needs no hub.

        Raises:
            UserError: `to` is no local folder, the name is not valid, or there is no token.
        """
        place = Folder(to)
        if place.is_remote or is_file(place):
            raise UserError("export: --push uploads a folder: give --to a local one")
        try:
            validate_repo_id(self.repo)
        except HFValidationError:
            raise self._error("not a valid name; give ORG/NAME") from None
        if self.repo.count("/") != 1:
            raise self._error("not a valid name; give ORG/NAME")
        if get_token() is None:
            raise self._error("there is no token; set HF_TOKEN, or run `hf auth login`")

    def check_hub(self) -> None:
        """Make the repository if it is new, and check that it can be written.

        Raises:
            UserError: the token may not write, the hub is out of reach, or the repository has the
                other visibility.
        """
        with self._explain_errors():
            api = HfApi()
            api.create_repo(
                self.repo, repo_type=self.kind, private=not self.is_public, exist_ok=True
            )
            api.auth_check(self.repo, repo_type=self.kind, write=True)
            is_private = api.repo_info(self.repo, repo_type=self.kind).private
        if is_private and self.is_public:
            raise self._error("is private; drop --public, or make it public on the hub")
        if not is_private and not self.is_public:
            raise self._error("is public; add --public, or make it private on the hub")

    def upload(self, to: str, run: str, parts: tuple[str, ...] = ()) -> str:
        """Upload what the export wrote into the folder `to`; return the repository's address.

        `run` is the run's name for the commit message; `parts` are folders of models in `to`.
        Other files that lie in the folder stay here.

        Raises:
            UserError: the repository has files of another export, the hub refuses a file, or the
                connection broke.
        """
        disable_progress_bars()
        files = self._files(Folder(to), parts)
        others = self._held() - set(files)
        stale = {gguf_name(last_name(to))} & others  # of earlier weights
        if others := stale or set(filter(self._is_read, others)):
            raise self._error(
                f"holds {min(others)} of another export, which would be read with this one; delete "
                f"it on the hub, or give another name"
            )
        with self._explain_errors():
            HfApi().upload_folder(
                repo_id=self.repo,
                repo_type=self.kind,
                folder_path=Folder(to).path,
                commit_message=f"Export of the {self.kind} of the run {run} by wrpo_ray",
                allow_patterns=[glob.escape(name) for name in files],
            )
        prefix = "datasets/" if self.kind == "dataset" else ""
        return f"{constants.ENDPOINT}/{prefix}{self.repo}"

    def _held(self) -> set[str]:
        """The files that the repository has."""
        with self._explain_errors():
            try:
                return set(HfApi().list_repo_files(self.repo, repo_type=self.kind))
            except EntryNotFoundError:  # it has none
                return set()

    def _is_read(self, name: str) -> bool:
        """Whether loaders would take a file of the repository for a part of the export."""
        if self.kind == "dataset":
            return name.startswith(f"{DATA}/")
        part, _, file = name.rpartition("/")
        is_ours = part in ("", *PARTS)
        return (is_ours and bool(weight_files([file]))) or name.startswith(TEMPLATES)

    def _files(self, place: Folder, parts: tuple[str, ...]) -> list[str]:
        if self.kind == "dataset":
            return [CARD, *(f"{DATA}/{name}" for name in place.files(DATA))]
        found = [CARD]
        for part in ("", *parts):
            root = os.path.join(place.path, part)
            names = [
                os.path.relpath(os.path.join(folder, name), root)
                for folder, _, files in os.walk(root)
                for name in files
            ]
            found += [os.path.join(part, name) for name in engine_files(names)]
        gguf = gguf_name(last_name(str(place)))
        found += [gguf] if place.exists(gguf) else []
        return found

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turn errors into a UserError of one line, without addresses: they may be signed."""
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            problem = f"{constants.ENDPOINT} answers {status}; run the command again later"
            if status in REFUSED:
                problem = f"{constants.ENDPOINT} does not let this token write it ({status})"
        except (HTTPError, ConnectionError) as error:
            name = type(error).__name__
            problem = f"{constants.ENDPOINT} is not reached ({name}); run the command again"
        except (OSError, RuntimeError) as error:
            problem = f"the upload broke ({type(error).__name__}); run the command again"
        except ValueError as error:
            problem = f"{constants.ENDPOINT} refuses a file ({type(error).__name__})"
        else:
            return
        raise self._error(problem)

    def _error(self, problem: str) -> UserError:
        return UserError(f"export: --push {self.repo}: {problem}")
