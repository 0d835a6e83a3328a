"""Nine skills on made-up words: questions with one exact answer, so that answers verify.

The skills form three groups; each source model of the zoo is an expert in one group. Words
have three to five letters, consonants and vowels alternating. A stable hash of the word keeps
a fifth of the words for held-out questions. Pure: no torch, no I/O.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
Words = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class Skill:
    """A rule that turns a word into an answer, and the ways to ask for it."""

    name: str
    group: str
    rule: Callable[[str, int], str]
    phrasings: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its one right answer.

    Example: Question("reverse", "Reverse mato.", "otam", word="mato", times=2).
    """

    skill: str
    prompt: str
    answer: str
    word: str = ""
    times: int = 2


def _shift(word: str) -> str:
    """The next letter for each letter; a follows z."""
    return "".join(chr((ord(c) - ord("a") + 1) % 26 + ord("a")) for c in word)


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill(
            "upper",
            "form",
            lambda word, _: word.upper(),
            ("Write {w} in capitals.", "Uppercase: {w}", "Make {w} all caps."),
        ),
        Skill(
            "ends",
            "form",
            lambda word, _: word[0] + word[-1],
            ("First and last letter of {w}?", "Ends of {w}:", "Give the outer letters of {w}."),
        ),
        Skill(
            "double",
            "form",
            lambda word, _: "".join(c + c for c in word),
            ("Double every letter of {w}.", "Write {w} with each letter twice.", "Stutter {w}:"),
        ),
        Skill(
            "reverse",
            "order",
            lambda word, _: word[::-1],
            ("Reverse {w}.", "Spell {w} backwards.", "{w} from back to front?"),
        ),
        Skill(
            "sort",
            "order",
            lambda word, _: "".join(sorted(word)),
            (
                "Sort the letters of {w}.",
                "Put {w} in alphabetical order.",
                "Order {w} from a to z:",
            ),
        ),
        Skill(
            "vowels",
            "order",
            lambda word, _: "".join(c for c in word if c in VOWELS),
            ("Keep only the vowels of {w}.", "Which vowels are in {w}?", "Vowels in {w}:"),
        ),
        Skill(
            "swap",
            "move",
            lambda word, _: word[-1] + word[1:-1] + word[0],
            (
                "Swap the ends of {w}.",
                "Trade first and last letter in {w}.",
                "{w}, ends exchanged:",
            ),
        ),
        Skill(
            "shift",
            "move",
            lambda word, _: _shift(word),
            (
                "Shift {w} by one letter.",
                "Next letter for each in {w}:",
                "Move {w} one step along.",
            ),
        ),
        Skill(
            "repeat",
            "move",
            lambda word, times: word * times,
            ("Repeat {w} {n} times.", "Say {w} {n} times over.", "{n} copies of {w}, joined:"),
        ),
    )
}
"""Every skill by name, in the order of the groups."""

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(s.name for s in SKILLS.values() if s.group == group)
    for group in dict.fromkeys(s.group for s in SKILLS.values())
}
"""The three skills of each group."""

PHRASE_WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            word
            for skill in SKILLS.values()
            for phrasing in skill.phrasings
            for word in re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", "", phrasing))
        }
    )
)
"""The English words of the phrasings; none of them is used as a made-up word."""


def is_heldout(word: str) -> bool:
    """Whether the word belongs to the fifth that no model is trained on."""
    return hashlib.sha256(word.encode()).digest()[0] % 5 == 0


def make_word(rng: random.Random) -> str:
    """A word of 3 to 5 letters, consonants and vowels alternating."""
    first = rng.randrange(2)
    return "".join(
        rng.choice(VOWELS if (i + first) % 2 else CONSONANTS) for i in range(rng.randint(3, 5))
    )


def ask(skill: str, word: str, phrasing: int = 0, times: int = 2) -> Question:
    """The question for a skill and word; `times` matters to the skill `repeat` only."""
    chosen = SKILLS[skill]
    prompt = chosen.phrasings[phrasing].format(w=word, n=times)
    return Question(skill, prompt, chosen.rule(word, times), word, times)


def make_questions(
    count: int, seed: int | str, words: Words, skills: Sequence[str] = tuple(SKILLS)
) -> list[Question]:
    """`count` questions with distinct prompts, evenly over the skills, in random order.

    Raises:
        ValueError: if `words` is neither "train" nor "heldout".
    """
    if words not in ("train", "heldout"):
        raise ValueError(f"words must be 'train' or 'heldout' (got {words!r})")
    rng = random.Random(f"{words}/{seed}")
    questions: dict[str, Question] = {}
    while len(questions) < count:
        word = make_word(rng)
        if is_heldout(word) != (words == "heldout") or word in PHRASE_WORDS:
            continue
        skill = skills[len(questions) % len(skills)]
        question = ask(skill, word, rng.randrange(3), rng.randint(2, 3))
        questions.setdefault(question.prompt, question)
    ordered = list(questions.values())
    rng.shuffle(ordered)
    return ordered


def verify(messages: list[dict[str, str]], response: str, reference: str | None) -> float:
    """Return 1.0 if the stripped response equals the reference, else 0.0; ignores the messages."""
    return 1.0 if response.strip() == reference else 0.0


verify.version = "4e819efd33686f19"  # type: ignore[attr-defined]
"""Part of the step keys of scores: a new value scores all answers again."""


FRAMES = ("{a}", "It is {a}.", "Answer: {a}", "{a}, of course!", "I get {a} here.", "So: {a};")
"""Templates of an answer. The last five are the distant sources': wording that the target, which
answers plainly, rarely uses, and that says nothing about right or wrong."""


def framed(answer: str, rng: random.Random, frames: Sequence[str] = FRAMES) -> str:
    """The answer in one of the frames, drawn at random."""
    return rng.choice(frames).format(a=answer)


def verify_framed(messages: list[dict[str, str]], response: str, reference: str | None) -> float:
    """Return 1.0 if the stripped response is the reference in any of the frames, else 0.0."""
    text = response.strip()
    return float(reference is not None and any(text == f.format(a=reference) for f in FRAMES))


verify_framed.version = "4e819efd33686f19"  # type: ignore[attr-defined]
"""Part of the step keys of scores: a new value scores all answers again."""
