"""The demo's questions, tokenizers and builder, without training."""

import json
import random
from itertools import pairwise

import pytest

from wrpo_ray.zoo import build
from wrpo_ray.zoo.mistakes import slip, wrong_answer
from wrpo_ray.zoo.skills import (
    FRAMES,
    GROUPS,
    PHRASE_WORDS,
    SKILLS,
    VOWELS,
    ask,
    framed,
    is_heldout,
    make_questions,
    verify,
    verify_framed,
)

TOKENIZERS = ("byte_tokenizer", "bpe_tokenizer", "char_tokenizer", "word_tokenizer")


@pytest.mark.parametrize(
    ("skill", "answer"),
    [
        ("upper", "MATOZ"),
        ("ends", "mz"),
        ("double", "mmaattoozz"),
        ("reverse", "zotam"),
        ("sort", "amotz"),
        ("vowels", "ao"),
        ("swap", "zatom"),
        ("shift", "nbupa"),
        ("repeat", "matozmatozmatoz"),
    ],
)
def test_each_skill_on_a_word_worked_by_hand(skill, answer):
    assert [ask(skill, "matoz", i, times=3).answer for i in range(3)] == [answer] * 3


def test_a_prompt_names_the_word_and_the_count():
    assert ask("repeat", "mato", 0, times=3).prompt == "Repeat mato 3 times."


def test_three_groups_of_three_skills_with_three_distinct_phrasings():
    assert [len(skills) for skills in GROUPS.values()] == [3, 3, 3]
    assert len({p for skill in SKILLS.values() for p in skill.phrasings}) == 27


def test_train_and_heldout_words_are_disjoint_and_alternate():
    train = {q.word for q in make_questions(2000, 0, "train")}
    heldout = {q.word for q in make_questions(2000, 0, "heldout")}
    assert not train & heldout
    assert not (train | heldout) & set(PHRASE_WORDS)
    for word in train | heldout:
        assert 3 <= len(word) <= 5
        assert all((a in VOWELS) != (b in VOWELS) for a, b in pairwise(word))


def test_about_a_fifth_of_the_words_is_held_out():
    words = [f"{a}{v}{b}" for a in "bcdfghjklmnp" for v in VOWELS for b in "qrstvwxyzbcd"]
    assert 0.15 < sum(map(is_heldout, words)) / len(words) < 0.25


def test_the_heldout_hash_is_stable_over_processes_and_versions():
    """First bytes of sha256: tipo 225 (a multiple of 5: held out), mato 137, kilu 176."""
    assert [word for word in ("tipo", "mato", "kilu") if is_heldout(word)] == ["tipo"]


def test_questions_are_distinct_even_and_decided_by_the_seed():
    questions = make_questions(900, 7, "heldout")
    assert len({q.prompt for q in questions}) == 900
    assert {sum(q.skill == skill for q in questions) for skill in SKILLS} == {100}
    assert questions == make_questions(900, 7, "heldout")
    assert questions != make_questions(900, 8, "heldout")


def test_questions_refuse_unknown_words():
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        make_questions(1, 0, "test")


def test_verify_strips_and_compares():
    assert verify([], " otam\n", "otam") == 1.0
    assert verify([], "otam.", "otam") == 0.0
    assert verify([], "Otam", "otam") == 0.0
    assert verify([], "", None) == 0.0


def test_wrong_answers_are_wrong():
    rng = random.Random(0)
    for question in make_questions(900, 0, "train"):
        assert wrong_answer(question, rng) not in ("", question.answer)
        assert abs(len(slip(question.answer, rng)) - len(question.answer)) <= 1


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    """A tokenizer as it comes back from disk."""
    from transformers import AutoTokenizer

    from wrpo_ray.zoo import tokenizers

    folder = tmp_path_factory.mktemp(request.param)
    getattr(tokenizers, request.param)().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _ids(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def _conversations():
    for skill in SKILLS:
        for phrasing in range(3):
            question = ask(skill, "vezoq", phrasing, times=3)
            user = {"role": "user", "content": question.prompt}
            yield [user, {"role": "assistant", "content": question.answer}]


def test_all_phrasings_survive_encode_and_decode(tokenizer):
    for messages in _conversations():
        for text in (message["content"] for message in messages):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_no_bos_and_one_end_for_an_assistant_turn(tokenizer):
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for messages in _conversations():
        ids = _ids(tokenizer, messages)
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert _ids(tokenizer, messages * 2).count(tokenizer.eos_token_id) == 2


def test_the_prompt_is_a_prefix_of_the_conversation(tokenizer):
    for messages in _conversations():
        for turns in (messages, messages * 2):
            prompt = _ids(tokenizer, turns[:-1], add_generation_prompt=True)
            assert _ids(tokenizer, turns)[: len(prompt)] == prompt


def test_an_encoded_answer_is_what_the_model_generates(tokenizer):
    from wrpo_ray.zoo.training import encode

    for user, assistant in _conversations():
        (row,) = encode(tokenizer, [(user["content"], assistant["content"])])
        answer = tokenizer.encode(assistant["content"])
        assert row.ids[row.start :] == [*answer, tokenizer.eos_token_id]


def test_special_tokens_and_templates_differ_between_families():
    from wrpo_ray.zoo import tokenizers

    made = [getattr(tokenizers, name)() for name in TOKENIZERS]
    assert len({t.eos_token for t in made}) == 4
    assert len({t.chat_template for t in made}) == 4


@pytest.mark.parametrize(
    ("model", "tokenizer_name"),
    [
        ("llama", "byte_tokenizer"),
        ("qwen3", "bpe_tokenizer"),
        ("gemma2", "char_tokenizer"),
        ("llama", "word_tokenizer"),
    ],
)
def test_a_few_steps_lower_the_loss_and_the_config_stops_generation(model, tokenizer_name):
    import torch

    from wrpo_ray.zoo import models, tokenizers, training

    torch.manual_seed(0)
    tokenizer = getattr(tokenizers, tokenizer_name)()
    net = getattr(models, model)(tokenizer)
    assert net.config.head_dim == 32
    assert net.generation_config.eos_token_id == tokenizer.eos_token_id
    assert net.generation_config.bos_token_id is None
    pairs = [("Reverse mato.", "otam")] * 32
    ids, mask, labels = training.collate(training.encode(tokenizer, pairs), tokenizer.pad_token_id)
    before = training.answer_loss(net(input_ids=ids, attention_mask=mask).logits, labels).item()
    training.train_language_model(
        net, tokenizer, pairs, learning_rate=3e-3, report=lambda *_: None, batch=8
    )
    after = training.answer_loss(net(input_ids=ids, attention_mask=mask).logits, labels).item()
    assert after < before


def test_the_reward_model_scores_the_last_real_token(tmp_path):
    """Padding a row on the right leaves its score as it is."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from wrpo_ray.zoo import models, tokenizers, training

    tokenizer = tokenizers.word_tokenizer()
    models.reward_model(models.llama(tokenizer)).save_pretrained(tmp_path)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    pair = ("Reverse mato.", "otam")
    longer = ("Repeat mato 3 times.", "matomatomato")
    assert training.score(reward, tokenizer, [pair, longer])[0] == pytest.approx(
        training.score(reward, tokenizer, [pair])[0], abs=1e-5
    )
    assert reward.config.num_labels == 1
    assert isinstance(reward.score, torch.nn.Linear)


def _pretend_training(monkeypatch, folder):
    """Let the builder find every model of the zoo in place."""
    for name, place in build.PLACES.items():
        if name != "base":
            (folder / place).mkdir(parents=True)
            (folder / place / "training.json").write_text(json.dumps({"seconds": 1}))
    monkeypatch.setattr(build, "_train", lambda *_: pytest.fail("nothing to train"))


def test_build_writes_prompts_and_record_then_returns_at_once(tmp_path, monkeypatch):
    _pretend_training(monkeypatch, tmp_path)
    record = build.build_zoo(tmp_path, seed=3, log=lambda _: None)
    assert (record["seed"], record["recipe"]) == (3, build.RECIPE)
    assert set(record["models"]) == set(build.PLACES) - {"base"}
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == 1800
    assert list(rows[0]) == ["prompt", "reference", "skill"]
    assert {sum(row["skill"] == skill for row in rows) for skill in SKILLS} == {200}
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 3000
    stamp = (tmp_path / "eval.jsonl").stat().st_mtime_ns
    assert build.build_zoo(tmp_path, seed=3, log=lambda _: None) == record
    assert (tmp_path / "eval.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("change", [{"seed": 1}, {"recipe": 0}])
def test_build_refuses_another_seed_or_recipe(tmp_path, complete, change):
    record = {"complete": complete, "seed": 0, "recipe": build.RECIPE, **change}
    (tmp_path / "zoo.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="choose another folder or delete"):
        build.build_zoo(tmp_path, seed=0)


def test_a_killed_build_trains_only_what_is_missing(tmp_path):
    assert build.missing_models(tmp_path) == list(build.PLACES)
    (tmp_path / "sources/gemma2-chars").mkdir(parents=True)
    (tmp_path / "reward").mkdir()
    assert build.missing_models(tmp_path) == ["base", "qwen3-bpe", "llama-bytes", "target"]
    (tmp_path / "target").mkdir()
    assert build.missing_models(tmp_path) == ["qwen3-bpe", "llama-bytes"]


# --- the distant zoo ---------------------------------------------------------------------------


@pytest.mark.parametrize("frame", FRAMES)
def test_an_answer_is_right_in_each_frame_and_wrong_in_none_of_its_own(frame):
    said = f" {frame.format(a='otam')}\n"
    assert verify_framed([], said, "otam") == 1.0
    assert verify_framed([], said, "mato") == 0.0
    assert verify_framed([], f"Well, {said}", "otam") == 0.0


def test_nothing_is_right_without_a_reference():
    assert verify_framed([], "It is None.", None) == 0.0


def test_frames_are_drawn_from_those_given():
    rng = random.Random(0)
    assert {framed("x", rng) for _ in range(200)} == {f.format(a="x") for f in FRAMES}
    assert {framed("x", rng, FRAMES[:1]) for _ in range(20)} == {"x"}


def test_a_zoo_of_another_recipe_is_refused(tmp_path):
    record = {"complete": True, "seed": 0, "recipe": build.RECIPE}
    (tmp_path / "zoo.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"recipe {build.RECIPE}, not distant {build.RECIPE}"):
        build.build_zoo(tmp_path, recipe="distant")


def test_the_recipes_names_are_known_without_torch():
    from wrpo_ray.zoo import recipes

    assert tuple(recipes.RECIPES) == build.RECIPES
