"""Checks before any work that a folder contains a usable model, without loading its weights.

Cheapest checks first: the files present, config.json, the headers of the weights, the tokenizer
with its chat template on two turns, and the tensors against the architecture. The last two take
seconds, mostly of imports; a folder that passed is recorded in the node's cache, and is not checked
again until a file changes.
"""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from wrpo_ray.data.records import Message
from wrpo_ray.errors import UserError
from wrpo_ray.llm.architecture import LANGUAGE_MODEL, Use, check_routers, check_tensors, telling_of
from wrpo_ray.llm.chat import answer_ids, conversation_ids, end_ids, prompt_ids
from wrpo_ray.llm.reasoning import Format, format_of
from wrpo_ray.llm.rendering import OWN, PROBE, Template, load_tokenizer
from wrpo_ray.storage.cache import node_cache
from wrpo_ray.storage.fingerprints import digest
from wrpo_ray.storage.folder import HUB_SCHEME, Folder
from wrpo_ray.storage.tensors import (
    SAVE_AGAIN,
    Tensors,
    check_no_pointer,
    check_trusted,
    list_weight_files,
    read_json,
    read_tensors,
)
from wrpo_ray.storage.weight_files import small_engine_files
from wrpo_ray.text.files import decode

Compare = Callable[[Path, Tensors, Use], None]
"""Raises UserError where a folder's tensors are not those of its config.json."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""Libraries whose version can change the result, like our own code."""
TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"
NO_ANSWERS = ("Classification", "QuestionAnswering", "ForMaskedLM", "RewardModel", "WithGating")
"""Parts of the names of architectures that do not generate answers."""
OBJECTS = (
    "config.json", GENERATION, TOKENIZER, "tokenizer.json", "special_tokens_map.json",
)  # fmt: skip
"""Optional files that contain a JSON object."""
CHAT: list[Message] = [
    {"role": "user", "content": "ALPHA"},
    {"role": "assistant", "content": "BRAVO"},
    {"role": "user", "content": "CHARLIE"},
]
"""Two turns with texts that no template alters."""


def check_model_folder(
    folder: Folder,
    what: str,
    use: Use,
    template: Template = OWN,
    name: str = "",
    check_config: Callable[[dict[str, Any]], None] | None = None,
    compare: Compare = check_tensors,
    trust: str | None = None,
) -> None:
    """Check without loading that a folder contains a model for a use.

    `name` is the user's name for it, if not the folder's address. Of a model on the hub the small
    files are read; its weights are compared where they are loaded. `check_config` raises UserError
    if the folder's config does not fit the use. `trust` is "pickle" if weights may be pickled.

    Raises:
        UserError: something is missing, broken, or of another model.
    """
    with telling_of(f"{what}: {name or folder}"), _reporting_unreadable_files():
        there, tensors = opened(folder, trust)
        config = read_json(there, "config.json")
        _check_architecture(config, use)
        if check_config:
            _check_with(check_config, config)
        _check_template_file(there, template)
        with _local_copy(there) as local:
            marker = _marker(local, use, template, tensors)
            if not marker.exists():
                _check_closely(local, use, template, tensors, compare)
                with suppress(OSError):  # a machine without room for it checks again
                    marker.parent.mkdir(parents=True, exist_ok=True)
                    marker.touch()


@contextmanager
def _reporting_unreadable_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot be read ({' '.join(str(error).split())}); put rights or network right"
        ) from None


def opened(folder: Folder, trust: str | None = None) -> tuple[Folder, Tensors | None]:
    """Return the folder of a model's small files, and its tensors (None for weights on the hub).

    Raises:
        UserError: a file is missing, cut off, or something else, or the weights are pickled and
            not trusted.
    """
    if not folder.uri.startswith(HUB_SCHEME):
        if not folder.exists("config.json"):
            lack = "has no config.json" if folder.exists() else "no such model folder"
            raise UserError(f"{lack}; give a Hugging Face model folder or hub id")
        names = folder.files()
        _check_no_adapter(names)
        check_trusted(list_weight_files(folder, names)[0], trust)
        return folder, read_tensors(folder)
    there, names = _on_hub(folder)
    _check_no_adapter(names)
    files = list_weight_files(there, names)[0]
    check_trusted(files, trust)
    is_here = set(files) <= set(there.files())
    return there, read_tensors(there) if is_here else None


def _check_no_adapter(names: list[str]) -> None:
    if "adapter_config.json" in names:
        raise UserError(
            "has an adapter_config.json, which transformers would load too, and vLLM would not; "
            "merge the adapter into the model, or delete the file"
        )


def small_files(folder: Folder) -> Folder:
    """Return the folder of a model's config and tokenizer: itself, or a copy of a hub model's.

    Raises:
        UserError: they cannot be downloaded from the hub.
    """
    return _on_hub(folder)[0] if folder.uri.startswith(HUB_SCHEME) else folder


def model_files(folder: Folder) -> tuple[Folder, list[str]]:
    """Return the folder of a model's config and tokenizer, and the names of all its files.

    Raises:
        UserError: they cannot be downloaded from the hub.
    """
    is_on_hub = folder.uri.startswith(HUB_SCHEME)
    return _on_hub(folder) if is_on_hub else (folder, folder.files())


def _on_hub(folder: Folder) -> tuple[Folder, list[str]]:
    """Return a copy of a model's small files, and the names of all its files."""
    from wrpo_ray.storage.hub import HubModel  # its client takes a moment to import

    found, names = HubModel.at(folder.uri).fetch_metadata()
    return Folder(str(found)), names


def _check_architecture(config: dict[str, Any], use: Use) -> None:
    names = config.get("architectures")
    if use.is_reward:
        return
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UserError(f"config.json: names no architecture; {SAVE_AGAIN}")
    if any(part in names[0] for part in NO_ANSWERS):
        raise UserError(f"its architecture {names[0]} gives no answers; {LANGUAGE_MODEL}")
    if use is Use.TRAINED:
        _check_trainable(config)


def _check_trainable(config: dict[str, Any]) -> None:
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    found = next(filter(None, (part.get("quantization_config") for part in parts)), None)
    if not found or (isinstance(found, dict) and found.get("dequantize") is True):
        return
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
    raise UserError(
        f"its weights are quantized ({method}), which cannot be trained; give the model in bf16 or "
        f"fp32"
    )


def _check_with(check: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    try:
        check(config)
    except (TypeError, AttributeError, KeyError, IndexError) as error:  # values of other types
        raise UserError(f"config.json: cannot be read ({error}); {SAVE_AGAIN}") from None


def _check_template_file(folder: Folder, template: Template) -> None:
    """Check that there is a template at all; `_check_turns` tries it."""
    if not folder.exists(TOKENIZER):
        raise UserError(f"has no {TOKENIZER}; {SAVE_AGAIN}")
    settings = read_json(folder, TOKENIZER)
    if not settings:  # transformers would guess the kind of tokenizer from the model's
        raise UserError(f"{TOKENIZER}: is empty; {SAVE_AGAIN}")
    if template.file is not None:
        if not Path(template.file).is_file():
            raise UserError(f"no such chat template file: {template.file}")
    elif not settings.get("chat_template") and not _has_text(folder, "chat_template.jinja"):
        raise UserError(
            "has no chat template; add chat_template.jinja to it, or set `chat_template` to a "
            "Jinja file"
        )


def _has_text(folder: Folder, name: str) -> bool:
    return folder.exists(name) and bool(folder.read(name).strip())


def reasoning_format(folder: Folder, template: Template) -> Format:
    """Return how the answers of a model in a folder show their reasoning.

    Raises:
        UserError: its template and tokenizer do not say so.
    """
    with _local_copy(small_files(folder)) as local:
        return format_of(load_tokenizer(local, template), template.parser)


# --- checks that take seconds ------------------------------------------------------------------


@contextmanager
def _local_copy(folder: Folder) -> Iterator[Path]:
    """Yield a local folder with all files but the weights."""
    if not folder.is_remote:
        yield Path(folder.path)
        return
    with tempfile.TemporaryDirectory(prefix="wrpo-model-") as scratch:
        for name in small_engine_files(folder.files()):
            (Path(scratch) / name).write_bytes(folder.read(name))
        yield Path(scratch)


def _marker(folder: Path, use: Use, template: Template, tensors: Tensors | None) -> Path:
    """Return the marker file that exists once a folder has passed with these inputs."""
    names = small_engine_files(Folder(str(folder)).files())
    inputs = [
        _own_code(),
        [importlib.metadata.version(library) for library in LIBRARIES],
        use,
        [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in names],
        template.file and _read_template(template.file),
        template.values,
        [template.reasoning, template.parser],
        tensors and sorted((n, t.dtype, t.shape) for n, t in tensors.items()),
    ]
    return node_cache().folder / "checked" / digest(inputs, 32)


@cache
def _own_code() -> str:
    """Return a digest of our code: after a change of it, folders are checked again."""
    package = Path(__file__).parents[1]
    folders = ("llm", "stages/score", "storage", "text")
    files = sorted(file for folder in folders for file in package.glob(f"{folder}/*.py"))
    return digest([file.read_text() for file in files], 16)


def _read_template(file: str) -> str:
    data = Path(file).read_bytes()
    check_no_pointer(data, file)
    return decode(data, file)


def _check_closely(
    folder: Path, use: Use, template: Template, tensors: Tensors | None, compare: Compare
) -> None:
    for name in small_engine_files(Folder(str(folder)).files()):
        check_no_pointer((folder / name).read_bytes(), name)
        if name in OBJECTS:
            read_json(Folder(str(folder)), name)
    _check_ends(folder)
    if use is Use.TRAINED:
        check_routers(folder)
    if tensors is not None:
        compare(folder, tensors, use)
    try:
        tokenizer = load_tokenizer(folder, template)
    except Exception as error:  # files of a tokenizer can be broken in any way
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"its tokenizer cannot be loaded ({type(error).__name__}: {told}); {SAVE_AGAIN}"
        ) from None
    format_ = format_of(tokenizer, template.parser) if template.reasoning else None
    reached = _check_turns(tokenizer, folder, use, format_)
    _check_ids(tokenizer, folder, reached, use)


def _check_ends(folder: Path) -> None:
    """Check that the ends of turns in generation_config.json are token ids."""
    is_there = (folder / GENERATION).is_file()
    listed = read_json(Folder(str(folder)), GENERATION).get("eos_token_id") if is_there else None
    if not all(type(end) is int for end in (listed if isinstance(listed, list) else [listed or 0])):
        raise UserError(
            f"its generation_config.json has eos_token_id {listed!r}; give a token id or a list"
        )


def _check_turns(tokenizer: Any, folder: Path, use: Use, format_: Format | None = None) -> set[int]:
    """Return the token ids of a chat of two turns by the template, and all ends of turns.

    Raises:
        UserError: the template fails, drops a text, or closes no answer.
    """
    _check_texts(tokenizer)
    if use.is_reward:
        return set(conversation_ids(tokenizer, CHAT, PROBE))
    ids = set(prompt_ids(tokenizer, CHAT))
    ends = end_ids(tokenizer, folder)
    if not ends:
        raise UserError(
            "nothing ends an answer: list the end of turn as eos_token_id in generation_config.json"
        )
    if use is Use.TRAINED:
        for messages in (CHAT[:1], CHAT):
            ids |= set(answer_ids(tokenizer, messages, PROBE, ends, format_=format_))
        _check_generation(folder, ends)
    return ids | ends


def _check_generation(folder: Path, ends: frozenset[int]) -> None:
    """Check that transformers loads generation_config.json, and saves it with all ends of turns.

    Saving a changed config checks more, for example a temperature without do_sample.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return
    try:
        found = GenerationConfig.from_pretrained(folder)
        listed = found.eos_token_id
        if missing := ends - set(listed if isinstance(listed, list) else [listed]):
            found.eos_token_id = sorted(missing)
        with tempfile.TemporaryDirectory() as scratch:
            found.save_pretrained(scratch)
    except OSError:
        raise
    except Exception as error:  # its values can be anything
        told = " ".join(str(error).split())[:300]
        raise UserError(f"generation_config.json: {told}; mend it") from None


def _check_texts(tokenizer: Any) -> None:
    """Check that the rendering contains every text of the chat, in order."""
    try:
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise anything
        told = " ".join(str(error).split())[:300]
        raise UserError(
            f"its chat template fails on two turns ({type(error).__name__}: {told}); set "
            f"`chat_template` to a Jinja file that takes user, assistant, user"
        ) from None
    place = 0
    for message in CHAT:
        place = text.find(message["content"], place)
        if place < 0:
            raise UserError(
                f"its chat template leaves out the {message['role']}'s text {message['content']!r} "
                f"of a chat of two turns; set `chat_template` to a Jinja file that writes all"
            )
        place += len(message["content"])


def _check_ids(tokenizer: Any, folder: Path, reached: set[int], use: Use) -> None:
    """Check that the embedding has a row for each id of texts and of the template.

    Special tokens beyond the embedding are allowed if nothing writes them: some models have them.
    """
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config") or config
    rows = text.get("vocab_size") or config.get("vocab_size")
    if not isinstance(rows, int):
        return  # of an architecture that only vLLM knows
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = (set(tokenizer.get_vocab().values()) - special) | reached
    if min(ids) < 0:
        raise UserError(f"{min(ids)} is no token id; put eos_token_id in its config right")
    if (highest := max(ids)) >= rows:
        raise UserError(
            f"its tokenizer has ids up to {highest}, its embedding only {rows} rows; give the "
            f"tokenizer that belongs to the weights"
        )
    pad = text.get("pad_token_id", config.get("pad_token_id"))
    if use.is_reward and pad is not None and pad >= rows:  # below 0 there is none
        raise UserError(
            f"its config.json has pad_token_id {pad}, outside of the embedding's {rows} rows; set "
            f"it to the tokenizer's id of the pad or end token"
        )
