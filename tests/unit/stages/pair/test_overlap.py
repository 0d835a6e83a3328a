"""Contamination in every script: what is compared, and which steps are made again."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wrpo_ray.config import Config
from wrpo_ray.errors import UserError
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.stages.ingest import cells
from wrpo_ray.stages.pair.overlap import are_unspaced, ngrams, overlaps

SPACED = {
    "English": ("Don't stop: 3.14 is not 22/7, is it?", "d8690860ab40"),
    "code": ("for (int i = 0; i < n_max; i++) { x[i] += f(i) * 2; }", "df20740cb5cb"),
    "German": ("Wie heißt die Straße, die über die Brücke führt?", "030371decd3b"),
    "Russian": ("Какой город является столицей России?", "c19dbfb5c9b1"),
    "Greek": ("Ποια είναι η πρωτεύουσα της Ελλάδας;", "b36a263f8186"),
    "Korean": ("대한민국의 수도는 어디입니까?", "e744c80fee4c"),
    "Hindi": ("भारत की राजधानी क्या है?", "007216c7ce9a"),
    "Arabic": ("ما هي عاصمة مصر؟", "e666b943c984"),
    "Hebrew": ("מהי בירת ישראל?", "6ff0a64a3cf6"),
    "Vietnamese": ("Thủ đô của Việt Nam là gì?", "eef915cfbb3c"),
    "Tibetan": ("བོད་ཀྱི་རྒྱལ་ས་གང་ཡིན།", "fe98a1aa9d83"),
    "Amharic": ("የኢትዮጵያ ዋና ከተማ ማን ናት?", "83cca862bd1a"),
    "emoji": ("👍 ok 😀😀", "3b230f036121"),
    "none": ("?!", "e3b0c44298fc"),
}
"""Texts, and a digest of the hashes of their 3-grams as they always were."""


@pytest.mark.parametrize(("text", "digest"), SPACED.values(), ids=list(SPACED))
def test_scripts_with_spaces_have_the_ngrams_that_they_had(text, digest):
    hashes, _ = ngrams(pa.array([text]), 3)
    assert hashlib.sha256(hashes.tobytes()).hexdigest()[:12] == digest
    assert are_unspaced(pa.array([text])).to_pylist() == [False]


UNSPACED = {
    "Chinese": "请用简单的语言向一个十岁的孩子解释为什么天空是蓝色的而日落是红色的",
    "traditional Chinese": "請用簡單的語言向一個十歲的孩子解釋為什麼天空是藍色的而日落是紅色的",
    "rare Chinese": "𠀀𠀁𠀂𠀃𠀄𠀅𠀆𠀇𠀈𠀉𠀊𠀋𠀌𠀍𠀎𠀏𠀐𠀑𠀒𠀓𠀔𠀕𠀖𠀗𠀘𠀙𠀚𠀛𠀜𠀝",
    "Japanese": "なぜ空は青く夕焼けは赤いのかを十歳の子供にわかるように説明してください",
    "Katakana": "アイスクリームトコーヒートケーキトチョコレートヲチュウモンシテクダサイ",
    "Thai": "ช่วยอธิบายให้เด็กอายุสิบขวบเข้าใจว่าทำไมท้องฟ้าถึงเป็นสีฟ้าและพระอาทิตย์ตกถึงเป็นสีแดง",
    "Lao": "ກະລຸນາອະທິບາຍໃຫ້ເດັກອາຍຸສິບປີເຂົ້າໃຈວ່າເປັນຫຍັງທ້ອງຟ້າຈຶ່ງເປັນສີຟ້າ",
    "Khmer": "សូមពន្យល់ក្មេងអាយុដប់ឆ្នាំថាហេតុអ្វីបានជាមេឃមានពណ៌ខៀវហើយថ្ងៃលិចមានពណ៌ក្រហម",
    "Burmese": "ဆယ်နှစ်အရွယ်ကလေးတစ်ယောက်ကိုကောင်းကင်ဘာကြောင့်အပြာရောင်ဖြစ်သည်ကိုရှင်းပြပါ",
    "mixed": "请解释iPhone 15和Pixel 8的相机有什么区别，并用Python写一个print('你好')的例子",
}


def contaminated(prompts: list[str], evaluation: list[str]) -> list[bool]:
    """Which of the prompts share 13 words, or letters, with an evaluation prompt."""
    known = np.unique(ngrams(pa.array(evaluation), 13)[0])
    return (overlaps(pa.array(prompts), 13, known) > 0).tolist()


@pytest.mark.parametrize("name", UNSPACED)
def test_scripts_without_spaces_are_compared_letter_by_letter(name):
    """What holds an evaluation prompt, or half of one, is found; what holds another is not."""
    text = UNSPACED[name]
    others = [other for key, other in UNSPACED.items() if name not in key and key not in name]
    within = ["前" + text + "后", f"Please: {text}!", text[len(text) // 2 :], text[::-1], *others]
    found = contaminated(within, [text])
    assert found == [True, True, True, False, *[False] * len(others)]
    assert are_unspaced(pa.array([text])).to_pylist() == [True]


@pytest.mark.parametrize("name", UNSPACED)
def test_a_short_prompt_in_any_script_counts_as_a_whole(name):
    short = UNSPACED[name][:6]
    longer = UNSPACED[name][:9]
    assert contaminated([short, f"«{short}»?", longer, short[:-1]], [short]) == [
        True, True, False, False,
    ]  # fmt: skip


def test_the_share_of_an_unspaced_prompt_by_hand():
    """Of 20 letters the last 15 are the evaluation prompt's: 3 of 8 13-grams."""
    letters = "".join(chr(0x4E00 + i) for i in range(20))
    known = np.unique(ngrams(pa.array([letters[5:]]), 13)[0])
    assert overlaps(pa.array([letters]), 13, known).tolist() == [3 / 8]


def chain(tmp_path, prompts: str, evaluation: str, suffix: str, *, escaped: bool) -> list[str]:
    """The keys of the steps of contamination."""
    for name, text in (("p", prompts), ("e", evaluation)):
        path, row = tmp_path / f"{name}.{suffix}", {"question": text, "other": "中"}
        if suffix == "jsonl":
            row.pop("other")
            path.write_text(json.dumps(row, ensure_ascii=escaped))
        else:
            pq.write_table(pa.Table.from_pylist([row]), path)
    return built(tmp_path, suffix)


def built(tmp_path, suffix: str) -> list[str]:
    given = {
        name: {"path": str(tmp_path / f"{name}.{suffix}"), "columns": {"prompt": "question"}}
        for name in ("p", "e")
    }
    tree = {
        "output": str(tmp_path / "out"), "prompts": given["p"],
        "sources": [{"name": "a", "model": "m"}], "target": {"name": "t", "model": "t"},
        "reward": {"function": "math:dist"}, "evaluate": {"prompts": given["e"]},
    }  # fmt: skip
    stages = Chain(Config.model_validate(tree), "prompts", {}, for_plan=True).build()
    return [
        s.key for stage in stages for s in stage.steps if s.name in ("eval-ngrams", "contamination")
    ]


@pytest.mark.parametrize("script", [*SPACED, *UNSPACED])
@pytest.mark.parametrize("place", ["prompts", "evaluation"])
@pytest.mark.parametrize(
    ("suffix", "escaped"), [("jsonl", True), ("jsonl", False), ("parquet", False)]
)
def test_only_contamination_of_scripts_without_spaces_has_a_new_key(
    tmp_path, monkeypatch, script, place, suffix, escaped
):
    text = UNSPACED.get(script) or SPACED[script][0]
    texts = ("plain", text) if place == "evaluation" else (text, "plain")
    keys = chain(tmp_path, *texts, suffix, escaped=escaped)
    assert len(keys) == 2
    monkeypatch.setattr("wrpo_ray.pipeline.inputs.Inputs.is_unspaced", lambda *_: False)
    as_before = chain(tmp_path, *texts, suffix, escaped=escaped)
    assert (keys != as_before) == (script in UNSPACED)


@pytest.mark.parametrize("place", ["p", "e"])
def test_a_broken_file_is_told_with_its_section(tmp_path, place):
    chain(tmp_path, "a", "b", "parquet", escaped=False)
    (tmp_path / f"{place}.parquet").write_bytes(b"PAR1, cut off")
    section = {"p": "prompts", "e": "evaluate.prompts"}[place]
    with pytest.raises(UserError, match=rf"^{section}: .*{place}.parquet cannot be read: "):
        built(tmp_path, "parquet")


@pytest.mark.parametrize("escaped", [True, False])
def test_what_a_file_holds_is_looked_for_once(tmp_path, monkeypatch, escaped):
    """By its contents, so that a changed file is looked at again."""
    before = chain(tmp_path, "a", "b", "jsonl", escaped=escaped)
    with monkeypatch.context() as patched:
        patched.setattr(cells, "_matches", lambda *_: pytest.fail("was looked at again"))
        assert built(tmp_path, "jsonl") == before
    text = UNSPACED["Chinese"]
    changed = chain(tmp_path, "a", text, "jsonl", escaped=escaped)
    assert changed != before
    assert changed == built(tmp_path, "jsonl")
    uris = [str(tmp_path / "p.jsonl"), str(tmp_path / "e.jsonl")]
    assert cells.beginnings_are(are_unspaced, uris, "question", f"both, {escaped}")
    assert not cells.beginnings_are(are_unspaced, uris[:1], "question", f"one, {escaped}")
