"""The frame of eight by three, a record for every method, and the page that is made of both."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lowbit import LowBitRecipe, methods, registry
from hf_lowbit.methods import CATEGORIES, METHODS, SUBCATEGORIES, taxonomy

ROOT = Path(__file__).parent.parent.parent
# Methods of this package that are no configs of transformers' kind, or are parts of others.
NOT_REGISTERED = {"tdquant"}
SLUG = re.compile(r"[a-z0-9_]+")


def test_eight_categories_of_three():
    assert len(CATEGORIES) == 8
    assert len(SUBCATEGORIES) == 24
    listed = [sub for category in CATEGORIES.values() for sub in category.subcategories]
    assert sorted(listed) == sorted(SUBCATEGORIES)  # each in exactly one
    assert all(sub in CATEGORIES[SUBCATEGORIES[sub].category].subcategories for sub in SUBCATEGORIES)
    assert all(SLUG.fullmatch(slug) for slug in (*CATEGORIES, *SUBCATEGORIES, *METHODS))
    assert not set(CATEGORIES) & set(SUBCATEGORIES)


def test_every_method_has_a_record():
    published = {"adasvd", "arb", "bidrn", "condiquant", "dvd_quant", "pbs2p", "quantcache", "recalkv"}
    assert set(METHODS) == published | NOT_REGISTERED
    missing = set(registry.methods()) - set(METHODS)
    assert not missing, f"no record in hf_lowbit/methods/records.py: {missing}"


def test_records_agree_with_what_is_registered():
    for name, method in registry.methods().items():
        info = METHODS[name]
        assert info.arxiv == method.paper
        assert info.part_of is None
        assert (info.needs_data == "training") == (method.needs == "training")
        assert method.config().method_info is info


def test_a_missing_record_is_noticed(monkeypatch):
    monkeypatch.delitem(taxonomy._METHODS, "arb")
    assert set(registry.methods()) - set(METHODS) == {"arb"}
    with pytest.raises(KeyError):
        _ = registry.get("arb").config().method_info


def test_placements_exist():
    for info in METHODS.values():
        assert taxonomy.problems(info) == []
        for category, sub in info.places:
            assert SUBCATEGORIES[sub].category == category
        assert (info.category is None) == (info.family == {"low_rank"})
        assert (info.part_of is None) == (info.slug not in NOT_REGISTERED)
        if info.venue:
            assert info.provenance["venue"]


def test_page_is_what_the_records_say():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == methods.as_table("markdown"), "run python -m hf_lowbit.methods --page"
    first = page.split("\n\n")[2]
    assert "Organized after the survey's 8 × 24 frame" in first and "sub-categories are ours" in first
    for part in ("Outside the taxonomy", "ninth family"):
        assert part in page


def test_json_comes_back_as_equal_records():
    rows = json.loads(methods.as_table("json"))
    assert [methods.MethodInfo(**row) for row in rows] == methods.find()
    assert [row["slug"] for row in rows] == sorted(METHODS)
    assert len(methods.as_table("rows")) == len(METHODS)
    with pytest.raises(ValueError, match="fmt must be one of markdown, json, rows, got 'html'"):
        methods.as_table("html")


def test_citations():
    text = methods.bibtex()
    keys = re.findall(r"^@\w+\{(\w+),$", text, flags=re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(METHODS)
    assert text.count("{") == text.count("}")
    assert methods.bibtex("arb", "ARB-LLM", "pbs2p").count("@") == 2  # each once
    for info in METHODS.values():
        assert f"eprint = {{{info.arxiv}}}" in info.bibtex and f"year = {{{info.year}}}" in info.bibtex


def test_provenance():
    found = [category.provenance for category in CATEGORIES.values()]
    assert sorted(found) == ["project"] * 5 + ["repo-history"] * 3
    assert {sub.provenance for sub in SUBCATEGORIES.values()} == {"project"}


@pytest.mark.parametrize(
    ("asked", "slug"),
    [
        ("DVD-Quant", "dvd_quant"),
        ("PBS²P", "pbs2p"),
        ("pbs2p", "pbs2p"),
        ("arb_llm", "arb"),
        ("BinaryHPE", "bidrn"),
        ("2DQUANT", "tdquant"),
    ],
)
def test_get_knows_spellings(asked, slug):
    assert methods.get(asked).slug == slug


def test_get_suggests():
    with pytest.raises(KeyError, match="did you mean: recalkv"):
        methods.get("recalvk")
    with pytest.raises(KeyError, match="known: adasvd, arb"):
        methods.get("xyzzy")


def test_find():
    def slugs(**asked):
        return [info.slug for info in methods.find(**asked)]

    assert slugs(family="low_rank") == ["adasvd", "recalkv"]
    assert slugs(compresses="kv_cache") == ["recalkv"]
    assert slugs(compresses="conv", max_weight_bits=1) == ["bidrn"]
    assert slugs(max_weight_bits=1) == ["arb", "bidrn", "pbs2p"]
    assert slugs(needs_data="training") == ["bidrn"]
    assert slugs(category="mixed_precision") == ["dvd_quant", "quantcache"]
    assert slugs(category="mixed_precision", primary_only=True) == []
    assert slugs(subcategory="rotation") == ["dvd_quant"]
    assert slugs(category="stochastic") == []
    assert slugs() == sorted(METHODS)
    for name in ("category", "subcategory", "compresses", "family", "needs_data"):
        with pytest.raises(ValueError, match=f"unknown {name} 'nope'; known: "):
            methods.find(**{name: "nope"})


def test_register(monkeypatch):
    monkeypatch.setattr(taxonomy, "_METHODS", dict(taxonomy._METHODS))
    other = dataclasses.replace(METHODS["arb"], slug="mine", title="Mine", aliases=())
    with pytest.raises(ValueError, match="'arb' has a record already"):
        methods.register(METHODS["arb"])
    methods.register(METHODS["arb"], replace=True)
    methods.register(other)
    assert methods.get("MINE") is other
    for change, message in (
        ({"category": None, "subcategory": None, "also": ()}, "category must be None for low-rank"),
        ({"subcategory": "rotation"}, "extreme_low_bit/rotation is no place"),
        ({"family": frozenset({"magic"})}, "family 'magic' is none of"),
        ({"bibtex": "@misc{x,"}, "balanced braces"),
        ({"slug": "No-Slug"}, "must be of a-z"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.register(dataclasses.replace(other, **{"slug": "yet_another", **change}))


def test_a_recipe_has_no_record_of_its_own():
    assert LowBitRecipe({"*": registry.get("arb").config()}).method_info is None


def test_command():
    def run(*arguments):
        command = [sys.executable, "-m", "hf_lowbit.methods", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert json.loads(run("--json").stdout) == json.loads(methods.as_table("json"))
    wrong = run("--bibtex", "nope")
    assert wrong.returncode == 2 and "no method 'nope'" in wrong.stderr


def test_command_in_process(capsys, tmp_path):
    from hf_lowbit.methods.__main__ import main

    assert main(["--markdown"]) == main([]) == 0
    assert capsys.readouterr().out == 2 * methods.as_table("markdown")
    assert main(["--bibtex", "arb"]) == 0
    assert capsys.readouterr().out == methods.bibtex("arb")
    assert main(["--page", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == methods.as_table("markdown")
    nowhere = str(tmp_path / "nowhere" / "page.md")
    for wrong, message in ((["--page", nowhere], "No such file"), (["--json", "--bibtex", "arb"], "not allowed with")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err


def test_values_of_wrong_types_are_refused():
    with pytest.raises(TypeError, match="name must be a string, got NoneType"):
        methods.get(None)
    with pytest.raises(ValueError, match="unknown method None"):
        registry.get(None)
    with pytest.raises(ValueError, match="unknown category"):
        methods.find(category=["training"])
    for bits in ("4", float("nan"), 0):
        with pytest.raises(ValueError, match="max_weight_bits must be a number above 0"):
            methods.find(max_weight_bits=bits)
    assert registry.method_info("dvd-quant") is METHODS["dvd_quant"]


def test_the_command_line_shows_the_records():
    from hf_lowbit.report import tables

    rows = tables.methods_json(registry.methods())
    assert [methods.MethodInfo(**row["record"]) for row in rows] == [METHODS[row["name"]] for row in rows]
    assert json.loads(json.dumps(rows)) == rows
    table = tables.methods_table(registry.methods())
    assert list(table.columns[0].cells) == [row["name"] for row in rows]
    assert "W1" in list(table.columns[3].cells)


def test_cards_cite_what_the_records_cite():
    """The cards' templates hold the same entries; only line breaks may differ."""
    from hf_lowbit.hf.card_page import TEMPLATES

    for slug, info in METHODS.items():
        template = TEMPLATES / f"{slug}.bib.jinja"
        if template.is_file():
            assert template.read_text(encoding="utf-8").split() == info.bibtex.split(), slug
