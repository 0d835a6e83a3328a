"""A reward function of jobs/gsm8k.yaml."""

import json


def asked_form(messages: list[dict[str, str]], response: str, reference: object) -> float:
    """1.0 if the answer has the JSON object that the prompts ask for, with all of its keys."""
    start, end = response.find("{"), response.rfind("}")
    try:
        found = json.loads(response[start : end + 1], strict=False)
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(found, dict) and {"reasoning", "answer"} <= found.keys())
