"""Download the files of a public benchmark and check their SHA-256.

Each address names a commit, which fixes the content. A file without a known checksum is recorded
in `SHA256SUMS` at the first download and compared with that from then on.
"""

import hashlib
import urllib.request
from pathlib import Path

from wrpo_ray.errors import UserError
from wrpo_ray.storage.publish import TEMPORARY_PREFIX

SUMS = "SHA256SUMS"
_ALPACA = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/{}/{}"
_ALPACA_AT = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
_GITHUB = "https://raw.githubusercontent.com/{}/{}/{}"

FILES: dict[str, dict[str, str]] = {
    "alpaca_eval": {
        "alpaca_eval_gpt4_baseline.json": _ALPACA.format(
            _ALPACA_AT, "alpaca_eval_gpt4_baseline.json"
        ),
        "df_gamed.csv": _ALPACA.format(_ALPACA_AT, "df_gamed.csv"),
        "alpaca_eval_clf.txt": _GITHUB.format(
            "tatsu-lab/alpaca_eval",
            "cd543a149df89434d8a54582c0151c0b945c3d20",
            "src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
        ),
    },
    "arena_hard": {
        "question.jsonl": _GITHUB.format(
            "lmarena/arena-hard-auto",
            "6c82720015d5da7b8795b809b91f63ef74abbf6a",
            "data/arena-hard-v0.1/question.jsonl",
        ),
        "gpt-4-0314.jsonl": _GITHUB.format(
            "lmarena/arena-hard-auto",
            "e0a8ea1df42c1df76451a6cd04b14e31ff992b87",
            "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
        ),
        "judge_config.yaml": _GITHUB.format(
            "lmarena/arena-hard-auto",
            "7f1b7f5dd6ce53e1f8530220ceb452b7019a8056",
            "config/judge_config.yaml",
        ),
    },
    "mt_bench": {
        "question.jsonl": _GITHUB.format(
            "lm-sys/FastChat",
            "589532dcfa83700f950b9aa3983416c543afabc0",
            "fastchat/llm_judge/data/mt_bench/question.jsonl",
        ),
        "gpt-4.jsonl": _GITHUB.format(
            "lm-sys/FastChat",
            "ae7cdfd1b823f0a7ed50b843963887a8b460c451",
            "fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl",
        ),
        "judge_prompts.jsonl": _GITHUB.format(
            "lm-sys/FastChat",
            "0e6e7fdc78bf64aceea1508694ce4e6472810b8b",
            "fastchat/llm_judge/data/judge_prompts.jsonl",
        ),
    },
}
"""{benchmark: {file: address}}"""

KNOWN = {"df_gamed.csv": "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"}
"""{file: SHA-256}, where it is known."""


def fetch(name: str, folder: Path, pinned: dict[str, str] | None = None) -> dict[str, str]:
    """Download the missing files of a benchmark, and check all of them.

    Args:
        name: a key of `FILES`.
        folder: where to write the files.
        pinned: {file: SHA-256} given by the user.

    Returns:
        {file: SHA-256} of all files.

    Raises:
        UserError: a download fails, or a file does not have the expected checksum.
    """
    wrong = set(pinned or {}) - FILES[name].keys()
    if wrong:
        raise UserError(
            f"--sha256: {name} has no file {min(wrong)}; it has {', '.join(FILES[name])}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    expected = KNOWN | read_sums(folder) | (pinned or {})
    found = {}
    for file, address in FILES[name].items():
        path = folder / file
        data = path.read_bytes() if path.exists() else _get(address)
        found[file] = hashlib.sha256(data).hexdigest()
        if expected.get(file, found[file]) != found[file]:
            raise UserError(
                f"{path if path.exists() else address} has SHA-256 {found[file]}, and not "
                f"{expected[file]}; delete the file and fetch it again, or give its right sum by "
                f"--sha256 {file}=..."
            )
        if not path.exists():
            partial = path.with_name(TEMPORARY_PREFIX + file)
            partial.write_bytes(data)
            partial.replace(path)
    lines = [f"{digest}  {file}\n" for file, digest in sorted(found.items())]
    (folder / SUMS).write_text("".join(lines))
    return found


def read_sums(folder: Path) -> dict[str, str]:
    """Read {file: SHA-256} of `SHA256SUMS`; empty without that file."""
    path = folder / SUMS
    lines = path.read_text().splitlines() if path.exists() else []
    return {file: digest for digest, _, file in (line.partition("  ") for line in lines)}


def _get(address: str) -> bytes:
    try:
        # addresses are constants of this module, all of https
        with urllib.request.urlopen(address, timeout=60) as response:  # nosec B310
            data: bytes = response.read()
    except OSError as error:
        raise UserError(f"{address} cannot be fetched: {error}") from None
    return data
