"""The published form of preference records, written row by row."""

from typing import Any


def to_published(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the published form from a PREFERENCE record."""
    messages = row["messages"]
    answers = {
        name: {"content": row[name]["text"], "role": "assistant"}
        for name in ("source_chosen", "target_chosen", "rejected")
    }
    return {
        "prompt_id": row["prompt_id"],
        "prompt": messages[0] if len(messages) == 1 else messages,
        "chosen": [answers["source_chosen"], answers["target_chosen"]],
        "rejected": [answers["rejected"]],
    }
