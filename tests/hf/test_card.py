"""Cards: every figure is the one that `inspect` reads, nobody's string leaves its place, and nothing is made up."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_lowbit import ARBConfig, DVDQuantConfig, LowBitRecipe, PBS2PConfig, quantize, registry
from hf_lowbit.hf.card import CardFields, Facts, ModelFacts, Scores, facts_of
from hf_lowbit.hf.card_page import TEMPLATES, check_card, escaped, render
from hf_lowbit.hf.save import save_model
from hf_lowbit.report.inspect import inspect
from tests.hf.test_transformers import QUIET, quick
from tests.tiny import tiny_model

FIELDS = CardFields("org/model", "mit", ("en",), ("tiny",))
NASTY = "<img src=x onerror=alert(1)>|`[a](javascript:b)` **c** ${d} {{ e }}\u202e\x1b[31m"


def card_of(folder, fields=FIELDS, **how):
    return render(facts_of(folder, "user/tiny-1bit", fields, **how))


def page(text):
    """HTML of a card, as the Hub shows it: raw HTML and tables are on."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("\n---\n", 1)[1])


@pytest.fixture
def results(model_folder):
    size = inspect(model_folder).total_bytes
    row = {"perplexity": 21.5, "bytes": size, "bits_per_parameter": 3.2, "tokens_per_second": None}
    dense = {"perplexity": 19.25, "bytes": 10 * size, "bits_per_parameter": 16.0, "tokens_per_second": 7.0}
    return {"data": "heldout.txt", "samples": 8, "sequence_length": 512, "models": {"tiny-1bit": row, "dense": dense}}


def test_figures_are_those_of_inspect(model_folder):
    text, found = card_of(model_folder), inspect(model_folder)
    for figure in (
        f"{found.parameters:,}", f"{found.bits_per_weight:.3f}", f"{found.bits_per_parameter:.3f}",
        f"{100 * found.packed_share:.1f} %", f"{found.total_bytes:,} bytes", found.config.calibration.sha256,
    ):  # fmt: skip
        assert figure in text
    stored = json.loads(re.search(r"```json\n(.*?)```", text, flags=re.DOTALL)[1])
    assert {**found.config.to_dict(), **stored} == found.config.to_dict()
    assert "modules" not in stored
    assert "No scores were measured" in text


def test_front_matter_is_what_the_hub_reads(model_folder, results):
    text = card_of(model_folder, results=results)
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == ("org/model", "mit", "transformers")
    assert data.get("base_model_relation") == "quantized"
    assert {"hf_lowbit", "arb", "arxiv:2410.03129", "tiny"} <= set(data.tags)
    (score,) = data.eval_results
    assert (score.metric_type, score.metric_value) == ("perplexity", 21.5)
    assert "dense model: 19.25" in score.metric_name
    assert check_card(text)["model-index"][0]["name"] == "tiny-1bit"


def test_the_snippet_is_python_that_imports_the_package(model_folder):
    code = re.search(r"```python\n(.*?)```", card_of(model_folder), flags=re.DOTALL)[1]
    compile(code, "card", "exec")
    assert code.startswith("import hf_lowbit")
    assert 'AutoModelForCausalLM.from_pretrained("user/tiny-1bit")' in code
    assert 'AutoTokenizer.from_pretrained("org/model")' in code  # none lies in this folder


def test_the_page_is_a_page(model_folder, results):
    html = page(card_of(model_folder, results=results))
    assert "<script" not in html
    assert html.count("<table>") == 3
    assert "<td>" in html
    assert len(re.findall(r"<h2>", html)) == 6
    assert "{{" not in html
    for row in re.findall(r"<tr>.*?</tr>", html, flags=re.DOTALL):
        assert row.count("<t") - 1 in (2, 3, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"base_model": "org/<b>"},
        {"base_model": "/home/me/model"},
        {"base_model": "a/b\x1b[0m"},
        {"base_model": "../x"},
        {"base_model": "a/b\n---"},
        {"license": "MIT License"},
        {"license": "mit\nx: y"},
        {"license": 3},
        {"tags": ("<script>",)},
        {"tags": ("a\x00",)},
        {"language": ("english please",)},
        {"pipeline_tag": "Text Generation"},
    ],
    ids=repr,
)
def test_fields_that_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be") as caught:
        CardFields(**fields)
    assert str(caught.value).isprintable()


def test_strings_of_others_show_and_do_nothing(model_folder, results):
    results["models"] = {NASTY: results["models"]["tiny-1bit"], "dense": results["models"]["dense"]}
    results["data"] = NASTY
    text = card_of(model_folder, results=results)
    html = page(text)
    assert "<img" not in html
    assert '<a href="javascript' not in html
    assert "<strong>c" not in html
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert yaml.safe_load(text.split("---\n")[1])["model-index"]
    for row in re.findall(r"<tr>.*?</tr>", html, flags=re.DOTALL):
        assert row.count("<t") - 1 in (2, 3, 4)


def test_escaping_is_undone_by_markdown():
    plain = "".join(c for c in NASTY if c.isprintable())
    assert MarkdownIt().renderInline(escaped(plain)) == plain.replace("<", "&lt;").replace(">", "&gt;")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["models"]["tiny-1bit"].update(bytes=5), "were measured on a model of 5 bytes"),
        (lambda found: found["models"]["tiny-1bit"].update(perplexity=float("nan")), "must be what"),
        (lambda found: found["models"]["tiny-1bit"].update(perplexity="low"), "must be what"),
        (lambda found: found["models"].clear(), "must be what"),
        (lambda found: found.pop("data"), "must be what"),
        (lambda found: found.update(models=[1]), "must be what"),
    ],
)
def test_results_of_something_else(model_folder, results, change, message):
    change(results)
    with pytest.raises(ValueError, match=message):
        card_of(model_folder, results=results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("base_model: org/model\n", ""), "base_model is missing"),
        (lambda text: text.replace("quantized\n---", "finetune\n---"), "base_model_relation must be quantized"),
        (lambda text: text.replace("- hf_lowbit\n", ""), "tags must name hf_lowbit"),
        (lambda text: text.replace("base_model: org/model", "base_model: <b>"), "base_model must be"),
        (lambda text: text.replace("license: mit", "license: [a"), "not valid YAML"),
        (lambda text: text.replace("import hf_lowbit", ""), "must say `import hf_lowbit`"),
        (lambda text: "# A model\n", "must begin with a front matter"),
    ],
)
def test_cards_that_are_none(model_folder, change, message):
    text = card_of(model_folder)
    assert check_card(text)["license"] == "mit"
    with pytest.raises(ValueError, match=message):
        check_card(change(text))


def test_every_method_has_its_limits_and_its_paper():
    for name, method in registry.methods().items():
        assert (TEMPLATES / f"{name}.md.jinja").is_file()
        assert method.paper in (TEMPLATES / f"{name}.bib.jinja").read_text()
        facts = Facts("user/x", FIELDS, "transformers", "AutoModel", "org/model", (name,), (ModelFacts(),), {})
        assert method.title in render(facts)
    with pytest.raises(ValueError, match="no such method"):
        render(Facts("user/x", FIELDS, "transformers", "AutoModel", "org/model", ("<b>",), (ModelFacts(),), {}))


def test_a_recipe_of_two_methods(tmp_path):
    model = tiny_model()
    options = {"calibration": None, "block_size": 32, "run": QUIET}
    recipe = LowBitRecipe({"*.mlp": PBS2PConfig(**options), "*": ARBConfig(**options)}, skip=["layers.0"])
    quantize(model, recipe)
    text = card_of(save_model(model, tmp_path / "mixed"))
    assert "- arb\n- pbs2p\n" in text
    assert "Progressive Binarization" in text
    assert "* Calibration: pbs2p: no data was used." in text
    assert '"pattern": "*.mlp"' in text


def test_what_a_budget_chose_is_shown(tmp_path):
    model = tiny_model()
    candidates = [DVDQuantConfig(preset="weights", w_bits=bits) for bits in (2, 4)]
    report = quantize(model, LowBitRecipe({"*": candidates}, target_bits_per_weight=3.6, run=QUIET))
    folder = save_model(model, tmp_path / "chosen")
    text = card_of(folder)
    assert "at most 3.6 bits per packed weight" in text
    rows = [line for line in text.splitlines() if re.match(r"\| [\w\\]+ \| dvd", line)]
    assert len(rows) == len(report.plan) == len(inspect(folder).config.plan)
    for row, line in zip(report.plan, rows, strict=True):
        assert f"{row['bytes']:,} bytes" in line and f"{8 * row['bytes'] / row['weights']:.3f}" in line
        assert escaped(row["settings"]) in line
    assert "more" in text and "layers.1.mlp.down_proj" not in text  # long lists of names are cut short
    assert '"plan"' not in text
    table = MarkdownIt("commonmark").enable("table").render(text)
    assert table.count("dvd_quant</td>") == len(rows)


def test_scores_without_a_dense_model():
    scores = Scores("texts", 1, 2, (("own", 3.0, 4, 5.0),))
    facts = Facts(
        "user/x", FIELDS, "transformers", "AutoModel", "org/model", ("arb",), (ModelFacts(),), {}, scores=scores
    )
    text = render(facts)
    assert "| own (this model) | 3.00 | 4 B (4 bytes) | 5.00 |" in text
    assert "(dense)" not in text


def test_quick_options_are_those_of_the_fixture(model_folder):
    """The recipe on the card makes the same config again."""
    stored = json.loads(re.search(r"```json\n(.*?)```", card_of(model_folder), flags=re.DOTALL)[1])
    assert stored["iterations"] == quick().iterations
