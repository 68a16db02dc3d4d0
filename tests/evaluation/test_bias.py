"""The study of bias: what a model writes about people, and which terms differ between groups of them."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, status_of, visible
from helpers.stores import encoded
from transformers import BertConfig, BertForSequenceClassification

from sft.evaluation.bias import generations
from sft.evaluation.bias.study import load_scorer, study
from sft.evaluation.bias.terms import compare, tfidf
from sft.models import family_at
from sft.models.base_model import prepare_in_cache

SAMPLES = os.environ.get("IDEFICS_SFT_SAMPLES")
COLOURS = ("red", "green", "blue", "teal")


def write_fairface(folder: Path) -> Path:
    """Four faces and one that does not decode, with an age that a spreadsheet made a date of."""
    (folder / "val").mkdir(parents=True)
    rows = ["file,age,gender,race,service_test"]
    for number, colour in enumerate(COLOURS):
        (folder / "val" / f"{number}.jpg").write_bytes(encoded(colour))
        rows.append(f"val/{number}.jpg,{('9-Mar', '20-29')[number % 2]},{('Male', 'Female')[number // 2]},Black,TRUE")
    (folder / "val" / "9.jpg").write_bytes(b"no image")
    rows.append("val/9.jpg,20-29,Male,Black,TRUE")
    (folder / "fairface_label_val.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_texts(file: Path, planted: str = "nurse") -> Path:
    """A hundred resumes; every second one of women has the planted word, all else is the same for everyone."""
    lines = []
    for number in range(100):
        words = ("teacher", "writer", "baker", "farmer")[number // 2 % 4]
        extra = f" {planted}" if number % 2 and number % 4 == 1 else ""
        groups = {"gender_phrase": ("man", "woman")[number % 2], "ethnicity_phrase": ("A", "B")[number // 50]}
        lines.append(
            {"image": f"{number}.jpg", **groups, "age_range": None, "9B_resume": f"Works as a {words}{extra}."}
        )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def printed(capsys, *arguments):
    assert status_of("bias", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def base(own_cache) -> Path:
    folder = REPOSITORY / "tiny_base"
    return prepare_in_cache(str(folder), family_at(folder), {})


def test_weights_are_those_of_the_formula():
    weights = tfidf(["The cat, the cat and a dog!", "a dog", "a bird", "a bird sings"])
    assert weights.terms == ["bird", "dog"]  # others are in one text, or stop words
    assert weights.values.tolist() == [1, 1, 1, 1]
    both, rare = tfidf(["ant bee bee", "ant", "bee", "ant", "ox", "yak"]).values[:2]
    idf = 1 + np.log(7 / np.array([4, 3]))  # ant is in three texts of six, bee in two
    assert [both, rare] == pytest.approx((idf * [1, 2] / np.linalg.norm(idf * [1, 2])).tolist(), abs=1e-12)


def test_a_planted_term_is_a_finding_and_noise_is_none(tmp_path, capsys):
    summary = printed(capsys, "--generations", write_texts(tmp_path / "texts.jsonl"), "--output", tmp_path / "out")
    by = summary["prompts"]["9B_resume"]["by"]
    assert {axis: [line["term"] for line in own["terms"] if line["is_finding"]] for axis, own in by.items()} == {
        "gender": ["nurse"],
        "ethnicity": [],
    }
    assert by["gender"]["terms"][0]["most"] == "woman" and by["gender"]["groups"] == {"man": 50, "woman": 50}
    assert len(by["ethnicity"]["terms"]) == 5  # the card's list is kept
    assert summary["toxicity_model"] is None and by["gender"]["toxicity"] == []
    page = (tmp_path / "out" / "bias.html").read_text()
    assert "nurse: most for woman" in page and "Toxicity was not measured" in page


def test_pure_noise_is_rarely_called_a_finding():
    random, words = np.random.default_rng(0), np.array([f"word{n}" for n in range(60)])
    images = [str(n) for n in range(60)]
    found = 0
    for _ in range(60):
        texts = [" ".join(random.choice(words, 8)) for _ in images]
        groups = dict(zip(images, random.choice(["a", "b", "c"], 60).tolist(), strict=True))
        found += compare(tfidf(texts), images, groups, 99)[0]["is_finding"]
    assert found <= 9  # 3 are expected; more than 9 in one of 1,000 cases


def test_texts_about_one_image_are_drawn_together():
    """Ten copies of the same text about each of four images say no more than one of each."""
    texts, images = ["ant bee"] * 20 + ["ant cow"] * 20, [str(n // 10) for n in range(40)]
    (line, *_) = compare(tfidf(texts), images, {"0": "x", "1": "x", "2": "y", "3": "y"}, 200)
    assert line["p"] == pytest.approx(1 / 3, abs=0.1)  # of the six ways to divide four images, two are as extreme


def test_a_killed_run_goes_on_and_asks_each_prompt_once(tmp_path, base, capsys, monkeypatch):
    monkeypatch.setattr(generations, "MAX_NEW_TOKENS", 4)
    data, out = write_fairface(tmp_path / "fairface"), tmp_path / "out"
    arguments = (base, "--data", data, "--prompt", "resume", "--prompt", "arrest", "--output", out)
    first = printed(capsys, *arguments)
    file = out / "generations.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 8 and first["images"] == 4 and first["skipped"] == {"image does not decode": 1}
    assert {json.loads(line)["age_range"] for line in lines} == {"3-9", "20-29"}
    file.write_text("".join(lines[:5]) + lines[5][:20])
    again = printed(capsys, *arguments)
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines) and again == first
    assert set(first["prompts"]["resume"]["by"]) == {"gender", "age"}  # all are of one ethnicity
    assert (out / "bias.html").read_text().count("data:image/jpeg") == 2
    assert printed(capsys, *arguments, "--limit", "2")["images"] == 2
    monkeypatch.setattr(generations, "MAX_NEW_TOKENS", 5)
    assert status_of("bias", *arguments) == 2
    assert "made by another model or other settings" in capsys.readouterr().err


def test_the_image_stands_before_the_prompt_in_the_only_turn(tmp_path, base, monkeypatch):
    data, asked = write_fairface(tmp_path / "fairface"), []
    monkeypatch.setattr(
        generations, "generate_answers", lambda *own, **_: [asked.append(one) or "A nurse." for one in own[2]]
    )
    people = generations.read_people(data, generations.Counter(), None)
    generations.write_texts(base, people, ["dating"], tmp_path / "texts.jsonl", lambda done: None)
    assert [message.role for message in asked[0].messages] == ["user"] and len(asked) == 4
    image, text = asked[0].messages[0].content
    assert image.source in {data / "val" / f"{number}.jpg" for number in range(4)}
    assert text.endswith("write two paragraphs of a dating profile for them in the first person.")


def test_stable_bias_is_read_from_parquet(tmp_path):
    images = [{"bytes": encoded(colour), "path": None} for colour in COLOURS]
    columns = {"image": images, "gender_phrase": ["man", "woman"] * 2, "ethnicity_phrase": ["A", "A", "B", ""]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    people = generations.read_people(tmp_path, generations.Counter(), None)
    assert people["train.parquet:2"].groups == {"gender": "woman", "ethnicity": "A"}
    assert people["train.parquet:4"].groups == {"gender": "woman"}


def test_a_local_classifier_scores_toxicity(tmp_path, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        id2label={0: "neutral", 1: "Toxic"}, label2id={"neutral": 0, "Toxic": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    scorer = load_scorer(tmp_path / "classifier")
    assert all(0 < score < 1 for score in scorer(["A dog.", "A cat."]))
    texts = generations.read_texts(write_texts(tmp_path / "texts.jsonl"), (), generations.Counter())["9B_resume"]
    by = study(texts, lambda texts: [float("nurse" in text) for text in texts])["by"]
    (line,) = by["gender"]["toxicity"]
    assert line["mean_by_group"] == {"man": 0, "woman": 0.5} and line["is_finding"]
    assert not by["ethnicity"]["toxicity"][0]["is_finding"]


WRONG = [
    ((), "needs MODEL and --data PATH, or --generations FILE"),
    (("model",), "needs MODEL and --data PATH"),
    (("model", "--data", "here", "--prompt", "poem"), "--prompt poem: expected some of resume, dating, arrest"),
    (("--generations", "texts.jsonl", "--limit", "3"), "without --limit"),
    (("--generations", "bare.jsonl"), "bare.jsonl: expected texts in resume or dating or arrest, and one of gender_ph"),
    (("--generations", "texts.jsonl", "--prompt", "poem"), "texts.jsonl: expected texts in poem"),
    (("--generations", "texts.jsonl", "--toxicity-model", "none"), "none: no text classifier to score toxicity by"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(own) for own, _ in WRONG])
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, refusal, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl")
    (tmp_path / "bare.jsonl").write_text('{"image": "a.jpg", "resume": "A cook."}\n')
    assert message in refusal("bias", *arguments)


def test_the_page_fits_a_desktop_and_a_phone(tmp_path, capsys, browser):
    printed(capsys, "--generations", write_texts(tmp_path / "texts.jsonl", "<b>nurse</b>"))
    for width in (1280, 390):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((tmp_path / "bias.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert visible(browser, "section > h3") == ["By gender: 1 finding", "By ethnicity: no findings"]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert "<b>nurse</b>" in visible(browser, "article dd")[0]


def test_the_prompts_for_red_teaming_are_shipped():
    lines = (REPOSITORY / "recipes" / "red_teaming_prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    assert len(prompts) >= 5 and all(own.keys() == {"id", "images", "prompt", "risk", "source"} for own in prompts)


@pytest.mark.skipif(SAMPLES is None, reason="IDEFICS_SFT_SAMPLES names no real samples")
@pytest.mark.parametrize("axis", ["gender", "ethnicity"])
def test_figures_are_those_of_scikit_learn_and_another_permutation_test(axis):
    folder = Path(SAMPLES) / "benchmarks" / "bias"
    expected = json.loads((folder / "expected.json").read_text())
    own = generations.read_texts(folder / "generations.jsonl", (), generations.Counter())["resume"]
    result = study(own, None)
    assert result["vocabulary"] == expected["vocabulary"]
    table = expected[f"{axis}_phrase"]
    assert result["by"][axis]["groups"] == table["groups"]
    for line, theirs in zip(result["by"][axis]["terms"], table["top"], strict=False):
        assert line["term"] == theirs["term"] and line["variance"] == pytest.approx(theirs["variance"], abs=1e-9)
        assert line["mean_by_group"] == pytest.approx(theirs["mean_by_group"], abs=1e-9)
        assert line["p"] == pytest.approx(theirs["p_max_statistic_500"], abs=0.07)
        assert line["is_finding"] == (theirs["p_max_statistic_500"] < 0.05)
