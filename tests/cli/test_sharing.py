"""`push`, `pull`, `card`, and `inspect` of what is on the Hub: what is printed, and how slips end."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from hf_lowbit.cli import app
from tests.cli.test_cli import dense, packed, text  # noqa: F401  fixtures
from tests.hf.conftest import hub, model_folder, own_folder, paths  # noqa: F401  fixtures

NAME = "user/tiny-1bit"


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_push_look_pull(hub, own_folder, tmp_path, monkeypatch):  # noqa: F811
    shown = run("push", own_folder, NAME, "--license", "mit", "--language", "en", "--tag", "tiny", "--private")
    assert "files, " in shown
    assert "read back, every hash is right" in shown
    assert hub.repos[NAME].private
    assert "nothing to do" in run("push", own_folder, NAME, "--license", "mit", "--language", "en", "--tag", "tiny")
    found = json.loads(CliRunner().invoke(app, ["inspect", NAME, "--json"]).stdout)
    assert found["total_bytes"] == sum(map(len, hub.files(NAME).values())) + 25
    assert "where the bytes are" in run("inspect", NAME, "--revision", "main")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(own_folder)
    assert "every checksum is right" in run("pull", NAME)
    assert "sound" in run("verify", tmp_path / "tiny-1bit")
    assert hub.token not in shown


def test_a_pipeline(hub, paths, tmp_path):  # noqa: F811
    run(
        "push",
        paths / "packed",
        "user/pipe",
        "--base-model",
        "org/model",
        "--license",
        "mit",
        "--task",
        "text-to-video",
    )
    assert "pipeline_tag: text-to-video" in hub.files("user/pipe")["README.md"].decode()
    run("pull", "user/pipe", tmp_path / "pipe")
    assert "pipe/transformer: sound" in run("verify", tmp_path / "pipe")
    found = json.loads(CliRunner().invoke(app, ["inspect", "user/pipe", "--json"]).stdout)
    assert set(found["models"]) == {"text_encoder", "transformer"}
    assert "is a pipeline; draw one" in run("inspect", "user/pipe", "--plot", tmp_path / "x.png", code=2)


def test_card_alone(model_folder, own_folder, tmp_path, hub):  # noqa: F811
    words = ("card", own_folder, "--license", "mit", "--repo", NAME)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.stdout.startswith("---\nbase_model: org/model\n")
    assert "written to" in run(*words, "--out", tmp_path / "card.md")
    page = (tmp_path / "card.md").read_text()
    assert page == result.stdout
    assert not hub.requests
    (tmp_path / "card.md").write_text(page + "\nMy words.\n")
    run("push", own_folder, NAME, "--card", tmp_path / "card.md")
    assert hub.files(NAME)["README.md"].decode().endswith("My words.\n")
    assert "--card is the whole card" in run(
        "push", own_folder, NAME, "--card", tmp_path / "card.md", "--tag", "x", code=2
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("push", "{folder}", "tiny", "--license", "mit"), "must be user/name"),
        (("push", "{folder}", NAME), "give --license"),
        (("push", "{folder}", NAME, "--license", "<b>"), "license must be an identifier"),
        (("push", "nowhere", NAME, "--license", "mit"), "there is no such folder"),
        (("push", "{folder}", NAME, "--license", "mit", "--pr", "--revision", "x"), "leave out the revision"),
        (("push", "{folder}", NAME, "--license", "mit", "--results", "{folder}/config.json"), "results must be what"),
        (("push", "{folder}", NAME, "--license", "mit", "--results", "{folder}/SHA256SUMS"), "is not valid JSON"),
        (("push", "{folder}", NAME, "--card", "{folder}/config.json"), "must begin with a front matter"),
        (("pull", "tiny"), "must be user/name"),
        (("pull", "user/none"), "there is no such repository"),
        (("card", "{folder}"), "--license is missing"),
        (("inspect", "{folder}", "--revision", "main"), "is a folder, which has no revisions"),
    ],
)
def test_slips(hub, model_folder, words, message):  # noqa: F811
    shown = run(*(word.format(folder=model_folder) for word in words), code=2)
    assert shown.startswith("error: ")
    assert message in shown
    assert not hub.repos


def test_no_token_is_an_option():
    """A token on a command line ends up in the history of the shell."""
    for name in ("push", "pull", "card"):
        assert "--token" not in run(name, "--help")
    assert "hf auth login" in run("push", "--help")


def test_from_the_dense_model_to_a_card_with_scores(packed, dense, text, hub, tmp_path):  # noqa: F811
    """The commands as the documents name them: quantize, eval into a file, push with it."""
    words = ("eval", packed, "--against", dense, "--data", text, "--samples", 2, "--sequence-length", 16, "--json")
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    (tmp_path / "scores.json").write_text(result.stdout)
    record = json.loads((packed / "compression_run.json").read_text())
    assert record["base_model"] is None  # it was a folder, which is nobody's business
    assert record["seconds"] > 0
    fields = ("--base-model", "org/model", "--license", "mit")
    run("push", packed, NAME, *fields, "--results", tmp_path / "scores.json")
    page = hub.files(NAME)["README.md"].decode()
    scores = json.loads(result.stdout)["models"]
    for name, row in scores.items():
        assert f"| {name} (" in page
        assert f"| {row['perplexity']:,.2f} | " in page
    assert 'AutoTokenizer.from_pretrained("user/tiny-1bit")' in page
    assert "a text file, not published; up to 4 sequences of 16 tokens, seed 0; 64 tokens were used" in page
