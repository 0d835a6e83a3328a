"""Wrong answers: another skill's, a slip, a near miss, a cut-off, a wrong word. Pure."""

import random
import string

from wrpo_ray.zoo.skills import SKILLS, Question, make_word


def slip(text: str, rng: random.Random) -> str:
    """The text with one letter replaced, inserted, dropped, or exchanged with its neighbour."""
    at = rng.randrange(len(text))
    letter = rng.choice(string.ascii_lowercase)
    match rng.randrange(4):
        case 0:
            return text[:at] + letter + text[at + 1 :]
        case 1:
            return text[:at] + letter + text[at:]
        case 2:
            return text[:at] + text[at + 1 :]
        case _:
            return text[:at] + text[at : at + 2][::-1] + text[at + 2 :]


def other_skill(question: Question, rng: random.Random) -> str:
    """The answer of another skill for the same word."""
    name = rng.choice([s for s in SKILLS if s != question.skill])
    return SKILLS[name].rule(question.word, question.times)


def _cut(question: Question, rng: random.Random) -> str:
    return question.answer[: rng.randrange(len(question.answer))]


def _wrong_word(question: Question, rng: random.Random) -> str:
    return SKILLS[question.skill].rule(make_word(rng), question.times)


def _slipped(question: Question, rng: random.Random) -> str:
    return slip(question.answer, rng)


def _near_miss(question: Question, rng: random.Random) -> str:
    """The right letters in another order, or too many or too few times."""
    if question.skill == "repeat":
        return SKILLS["repeat"].rule(question.word, rng.choice((1, 2, 3, 4)))
    letters = list(question.answer)
    rng.shuffle(letters)
    return "".join(letters)


def wrong_answer(
    question: Question,
    rng: random.Random,
    weights: tuple[float, float, float, float, float] = (0.3, 0.3, 0.25, 0.05, 0.1),
) -> str:
    """A wrong, non-empty answer.

    `weights` are those of another skill, a slip, a near miss, a cut-off, a wrong word.
    """
    kinds = (other_skill, _slipped, _near_miss, _cut, _wrong_word)
    while True:
        text = rng.choices(kinds, weights)[0](question, rng)
        if text not in ("", question.answer):
            return text
