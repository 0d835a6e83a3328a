"""A reward that workers import: how well a text does, by the first of some words in it."""

from zlib import crc32

GRADES = {"good": 3, "even": 2, "bad": 1}


def grade(text: str) -> int:
    return next((g for word, g in GRADES.items() if word in text), 0)


def reward(messages, response: str, reference: str | None) -> float:
    return float(grade(response))


def checksum(messages, text: str, reference: object) -> float:
    """A number from 0 to 1 that only the text decides."""
    return crc32(text.encode()) / 2**32
