"""How each model of the zoo is trained, measured and saved.

The target has latent ability and bad habits, as a real instruct model has: it learns every
skill, then, briefly, wrong habits. Preference optimisation elicits; it does not teach.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from wrpo_ray.llm.architecture import Use, check_weights
from wrpo_ray.zoo import models, tokenizers, training
from wrpo_ray.zoo.mistakes import slip, wrong_answer
from wrpo_ray.zoo.skills import (
    FRAMES,
    GROUPS,
    SKILLS,
    Question,
    framed,
    make_questions,
    verify_framed,
)

BATCH = 32
MEASURE = 900
"""Held-out questions that a model is measured on, a hundred a skill."""

Trained = tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, float]]
"""A model, its tokenizer, its measures."""


@dataclass(frozen=True, slots=True)
class Source:
    """A source model: an expert in one group of skills."""

    group: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    model: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    steps: int
    slips: float
    """Share of slips in its training answers, which its samples then show."""
    learning_rate: float = 3e-3
    frames: tuple[str, ...] = FRAMES[:1]
    """Templates of its answers."""


SOURCES: dict[str, Source] = {
    "llama-bytes": Source("form", tokenizers.byte_tokenizer, models.llama, 900, 0.02),
    "qwen3-bpe": Source("order", tokenizers.bpe_tokenizer, models.qwen3, 1000, 0.05),
    "gemma2-chars": Source("move", tokenizers.char_tokenizer, models.gemma2, 1000, 0.08, 4e-3),
}
"""The sources of the near recipe: nearly always right, in the target's own style."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings that differ between zoos."""

    sources: dict[str, Source]
    base_framed: float = 0.0
    """Share of the base model's training answers that are in a frame. It determines how well the
    target, whose own answers are plain, knows the sources' wording."""
    reward_steps: int = 1200
    reward_flips: float = 0.0
    """Share of the reward model's training pairs that are the wrong way round."""
    reward_frames: tuple[str, ...] = FRAMES[:1]
    """Frames of the answers it is trained on, the same for right and wrong ones."""


def _distant(source: Source, slips: float, frames: tuple[str, ...]) -> Source:
    return replace(source, slips=slips, frames=frames)


RECIPES: dict[str, Recipe] = {
    "near": Recipe(SOURCES),
    "distant": Recipe(
        {
            "llama-bytes": _distant(SOURCES["llama-bytes"], 0.3, FRAMES[1:4]),
            "qwen3-bpe": _distant(SOURCES["qwen3-bpe"], 0.4, FRAMES[2:5]),
            "gemma2-chars": _distant(SOURCES["gemma2-chars"], 0.4, FRAMES[3:6]),
        },
        base_framed=0.2,
        reward_flips=0.1,
        reward_frames=FRAMES,
    ),
}
"""`near` is the demo's. In `distant` the sources err often and word their answers in frames that
vary and that the target rarely uses; the reward model is trained on noisy preferences and errs more
often."""


def train(name: str, folder: Path, base: Path, seed: int, recipe: str = "near") -> dict[str, float]:
    """Train, measure and save one model of the zoo into `folder`.

    Args:
        name: a source's name, "base", "target" or "reward".
        folder: where to write; made here.
        base: folder of the finished base model, read for "target" and "reward".
        seed: of the whole zoo.
        recipe: one of `RECIPES`.

    Returns:
        The model's measures, which also lie in the folder as training.json.
    """
    torch.set_num_threads(1)
    torch.manual_seed(random.Random(f"{seed}/{name}").getrandbits(32))
    started = time.monotonic()
    if name == "base":
        model, tokenizer, measures = train_base(seed, RECIPES[recipe])
    elif name == "target":
        model, tokenizer, measures = train_target(base, seed)
    elif name == "reward":
        model, tokenizer, measures = train_reward(base, seed, RECIPES[recipe])
    else:
        model, tokenizer, measures = train_source(name, seed, RECIPES[recipe].sources[name])
    _save(model, folder)
    tokenizer.save_pretrained(folder)
    measures = {**measures, "seconds": round(time.monotonic() - started, 1)}
    (folder / "training.json").write_text(json.dumps(measures, indent=2), encoding="utf-8")
    return measures


def train_source(name: str, seed: int, source: Source) -> Trained:
    """An expert in its group, measured on questions inside and outside it."""
    inside = GROUPS[source.group]
    tokenizer = source.tokenizer()
    model = source.model(tokenizer)
    rng = random.Random(f"{seed}/{name}/slips")
    wording = random.Random(f"{seed}/{name}/frames")
    answers = [
        (q.prompt, slip(q.answer, rng) if rng.random() < source.slips else q.answer)
        for q in make_questions(source.steps * BATCH, f"{seed}/{name}", "train", inside)
    ]
    pairs = [(prompt, framed(answer, wording, source.frames)) for prompt, answer in answers]
    training.train_language_model(
        model, tokenizer, pairs, learning_rate=source.learning_rate, report=_reporter(name)
    )
    by_skill = accuracy_by_skill(model, tokenizer, heldout(seed))
    outside = [s for s in SKILLS if s not in inside]
    return (
        model,
        tokenizer,
        {
            "inside": _mean([by_skill[s] for s in inside]),
            "outside": _mean([by_skill[s] for s in outside]),
        },
    )


def train_base(seed: int, recipe: Recipe, steps: int = 1200) -> Trained:
    """Right on every skill: what the target and the reward model start from."""
    tokenizer = tokenizers.word_tokenizer()
    model = models.llama(tokenizer)
    questions = make_questions(steps * BATCH, f"{seed}/base", "train")
    wording = random.Random(f"{seed}/base/frames")
    pairs = [
        (q.prompt, framed(q.answer, wording) if wording.random() < recipe.base_framed else q.answer)
        for q in questions
    ]
    training.train_language_model(
        model, tokenizer, pairs, learning_rate=3e-3, report=_reporter("base")
    )
    return model, tokenizer, {"greedy": _greedy(model, tokenizer, seed)}


def train_target(
    base: Path, seed: int, steps: int = 300, right: float = 0.3, learning_rate: float = 1e-3
) -> Trained:
    """The base model with bad habits: answers of another skill, and slips."""
    model, tokenizer = _load(base)
    rng = random.Random(f"{seed}/target/habits")
    questions = make_questions(steps * BATCH, f"{seed}/target", "train")
    pairs = [(q.prompt, habitual_answer(q, rng, right)) for q in questions]
    training.train_language_model(
        model, tokenizer, pairs, learning_rate=learning_rate, report=_reporter("target")
    )
    latent = json.loads((base / "training.json").read_text(encoding="utf-8"))["greedy"]
    return model, tokenizer, {"greedy": _greedy(model, tokenizer, seed), "base_greedy": latent}


def habitual_answer(question: Question, rng: random.Random, right: float) -> str:
    """The right answer with probability `right`, else another skill's or a slip."""
    if rng.random() < right:
        return question.answer
    return wrong_answer(question, rng, weights=(0.75, 0.25, 0, 0, 0))


def train_reward(base: Path, seed: int, recipe: Recipe) -> Trained:
    """A Bradley-Terry reward model, measured on held-out pairs of right and wrong answers."""
    language, tokenizer = _load(base)
    model = models.reward_model(language)
    questions = make_questions(recipe.reward_steps * BATCH, f"{seed}/reward", "train")
    triples = reworded(wrong_pairs(questions, f"{seed}/reward"), seed, recipe)
    training.train_reward_model(
        model, language.lm_head, tokenizer, triples, learning_rate=1e-3, report=_reporter("reward")
    )
    held = wrong_pairs(heldout(seed), f"{seed}/reward/heldout")
    right = training.score(model, tokenizer, [(p, chosen) for p, chosen, _ in held])
    wrong = training.score(model, tokenizer, [(p, rejected) for p, _, rejected in held])
    pairs = _mean([float(r > w) for r, w in zip(right, wrong, strict=True)])
    return model, tokenizer, {"pairs": pairs}


def wrong_pairs(questions: list[Question], seed: str) -> list[tuple[str, str, str]]:
    """(prompt, right answer, wrong answer) for each question."""
    rng = random.Random(seed)
    return [(q.prompt, q.answer, wrong_answer(q, rng)) for q in questions]


def reworded(
    triples: list[tuple[str, str, str]], seed: int, recipe: Recipe
) -> list[tuple[str, str, str]]:
    """The triples in the recipe's frames, some with right and wrong answer exchanged."""
    wording, noise = (random.Random(f"{seed}/reward/{what}") for what in ("frames", "flips"))
    found = []
    for prompt, right, wrong in triples:
        texts = [framed(answer, wording, recipe.reward_frames) for answer in (right, wrong)]
        first, second = reversed(texts) if noise.random() < recipe.reward_flips else texts
        found.append((prompt, first, second))
    return found


def heldout(seed: int) -> list[Question]:
    """The held-out questions that all models of a zoo are measured on."""
    return make_questions(MEASURE, f"{seed}/measure", "heldout")


def accuracy_by_skill(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question]
) -> dict[str, float]:
    """Share of right greedy answers for each skill."""
    answers = training.generate(model, tokenizer, [q.prompt for q in questions])
    right: dict[str, list[float]] = {skill: [] for skill in SKILLS}
    for question, answer in zip(questions, answers, strict=True):
        right[question.skill].append(verify_framed([], answer, question.answer))
    return {skill: _mean(values) for skill, values in right.items()}


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    return _mean(list(accuracy_by_skill(model, tokenizer, heldout(seed)).values()))


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Write the files of `save_pretrained`, which would import DeepSpeed and take seconds."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    weights = dict(model.named_parameters())  # tied ones once, under the name vLLM looks for
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    check_weights(folder, Use.TRAINED)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def _reporter(name: str) -> training.Report:
    def report(step: int, steps: int, loss: float) -> None:
        print(f"zoo: {name} step {step}/{steps} loss {loss:.3f}", flush=True)

    return report
