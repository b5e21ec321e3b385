"""Pushes to a Hub of our own: one commit or nothing, whatever fails; and what is refused before a byte is sent."""

import hashlib
import io
import json
import logging

import pytest
from huggingface_hub import constants
from huggingface_hub import logging as hub_logging
from safetensors.torch import load_file, save_file

from hf_lowbit import CheckpointError, HubError
from hf_lowbit.hf import hub as module
from hf_lowbit.hf import preflight
from hf_lowbit.hf.card import CardFields
from hf_lowbit.hf.hub import push_folder
from hf_lowbit.hf.hub_errors import scrubbed

NAME = "user/tiny-1bit"
MIT = CardFields(license="mit")
WEIGHTS = "model.safetensors"
UPLOAD, COMMIT = "PUT /lfs/", "POST .*/commit/"


@pytest.fixture(autouse=True)
def no_token_in_any_log(hub, caplog):
    """Whatever a test does, no library says the token, at no level."""
    caplog.set_level(logging.DEBUG)
    hub_logging.enable_propagation()
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_debug()
    yield
    hub_logging.set_verbosity(level)
    hub_logging.disable_propagation()
    lines = [record.getMessage() for record in caplog.get_records("call")]
    assert any("Request" in line for line in lines) or not hub.requests
    assert not any(hub.token in line for line in lines)


def on_disk(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_whole(hub, folder, repo=NAME, revision="main"):
    """The repository holds the files of the folder, byte for byte, and a card."""
    found = hub.files(repo, revision)
    assert "import hf_lowbit" in found.pop("README.md").decode()
    assert found == on_disk(folder)


def refused(hub, folder, message, repo=NAME, fields=MIT, **how):
    """The push ends in an error that says this, and in nothing that could be used by somebody else."""
    with pytest.raises((HubError, CheckpointError, ValueError), match=message) as caught:
        push_folder(folder, repo, fields, **how)
    text = str(caught.value)
    assert hub.token not in text
    assert "signature" not in text
    assert text.isprintable()
    assert caught.value.__cause__ is None
    return text


def test_a_push_is_one_commit_of_all_files(hub, model_folder):
    done = push_folder(model_folder, NAME, MIT)
    assert_whole(hub, model_folder)
    before, after = hub.repos[NAME].commits.values()
    assert set(before) == {".gitattributes"}
    assert {"config.json", WEIGHTS, "README.md"} <= set(after)
    assert done.commit == hub.repos[NAME].branches["main"]
    assert done.files == len(hub.files(NAME))
    assert done.size == sum(map(len, hub.files(NAME).values()))
    assert not done.unchanged
    assert not hub.repos[NAME].private
    assert not any(authorized for _, path, _, authorized, _ in hub.requests if path.startswith("/lfs/"))
    assert all(hub.token.encode() not in content for content in hub.files(NAME).values())


def test_the_same_model_again_is_no_commit(hub, model_folder):
    push_folder(model_folder, NAME, MIT)
    sent = len(hub.asked("POST|PUT"))
    assert push_folder(model_folder, NAME, MIT).unchanged
    assert len(hub.asked("POST|PUT")) == sent
    # another card is no other model
    done = push_folder(model_folder, NAME, CardFields(license="mit", language=("en",)))
    assert not done.unchanged
    assert len(hub.asked(UPLOAD)) == 1
    assert "language:\n- en" in hub.files(NAME)["README.md"].decode()


def test_in_parts(hub, model_folder):
    hub.part_size = 50_000
    push_folder(model_folder, NAME, MIT)
    assert_whole(hub, model_folder)
    assert len(hub.asked(UPLOAD)) == -(-(model_folder / WEIGHTS).stat().st_size // 50_000)


# What passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "how", "waited"),
    [
        (UPLOAD, {"drop": True}, None),
        (UPLOAD, {"status": 503, "times": 2}, None),
        (COMMIT, {"drop": True}, [1.0]),
        (COMMIT, {"after": True}, []),
        (COMMIT, {"status": 500, "times": 2}, [1.0, 2.0]),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "7"}}, [7.0]),
        ("GET /api/models", {"status": 502}, [1.0]),
        ("POST /api/repos/create", {"drop": True}, [1.0]),
    ],
    ids=lambda value: str(value),
)
def test_what_passes_is_waited_for(hub, model_folder, pattern, how, waited):
    hub.fail(pattern, **how)
    push_folder(model_folder, NAME, MIT)
    assert_whole(hub, model_folder)
    assert len(hub.repos[NAME].commits) == 2
    if waited is not None:
        assert hub.waits == waited


# What stays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        (UPLOAD, {"drop": True}, "the connection to the Hub failed .*run the same command again"),
        (UPLOAD, {"status": 500}, r"trouble of its own \(status 500\); run the same command again"),
        (COMMIT, {"drop": True}, "the connection to the Hub failed .*run the same command again"),
        (COMMIT, {"status": 503}, r"trouble of its own \(status 503\)"),
        (COMMIT, {"status": 409, "message": "<b>busy</b>\u001b[31m"}, "busy with another change"),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "3600"}}, "wait 3600 s, then run the same command again"),
        ("preupload", {"status": 403}, "your token may not write there"),
        ("POST /api/repos", {"status": 403, "message": "no hf_" + "a" * 30}, r"may not write.*no \(token\)"),
        ("validate-yaml", {"status": 400}, r"refused with status 400 .*switched to fail"),
        ("GET /api/models", {"status": 401, "message": "Invalid credentials in Authorization header"}, "log in with"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_stays_is_said_and_nothing_is_visible(hub, model_folder, pattern, how, message):
    hub.fail(pattern, times=10**6, **how)
    refused(hub, model_folder, message)
    assert NAME not in hub.repos or hub.files(NAME) == {}
    hub.faults.clear()
    arrived = set(hub.stored)
    hub.requests.clear()
    push_folder(model_folder, NAME, MIT)
    assert_whole(hub, model_folder)
    sent = {path.rpartition("/")[2] for method, path, *_ in hub.requests if method == "PUT"}
    assert not sent & arrived  # nothing is sent twice


def test_a_lost_answer_to_a_pull_request_makes_no_second_one(hub, model_folder):
    push_folder(model_folder, NAME, MIT)
    hub.fail(COMMIT, after=True)
    other = CardFields(license="mit", language=("en",))
    refused(hub, model_folder, "look whether the pull request is there", fields=other, create_pr=True)
    assert [name for name in hub.repos[NAME].branches if name != "main"] == ["refs/pr/1"]


def test_other_bytes_on_the_hub_are_noticed_and_put_right(hub, model_folder):
    hub.fail(UPLOAD, corrupt=True)
    refused(hub, model_folder, rf"holds other bytes than were sent, in {WEIGHTS}")
    push_folder(model_folder, NAME, MIT, replace=True)
    assert_whole(hub, model_folder)


def test_a_commit_of_somebody_else_meanwhile(hub, model_folder, monkeypatch):
    operations = module._Push._operations

    def late(self, stale):
        repo = hub.repos[NAME]
        repo.commit("main", {**repo.commits[repo.branches["main"]], "notes.md": (b"theirs", False)})
        return operations(self, stale)

    monkeypatch.setattr(module._Push, "_operations", late)
    refused(hub, model_folder, "somebody else has changed it meanwhile; nothing was changed")
    assert set(hub.files(NAME)) == {"notes.md"}
    monkeypatch.undo()


# Tokens and names --------------------------------------------------------------------------------------------------


def test_no_token(hub, model_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(hub, model_folder, "no token to push with; log in with `hf auth login`")
    assert not hub.requests


def test_a_client_that_is_switched_off(hub, model_folder, monkeypatch):
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    refused(hub, model_folder, "the Hub is switched off here")
    assert not hub.requests


def test_an_unknown_token_and_one_that_only_reads(hub, model_folder):
    refused(hub, model_folder, "does not know this token; log in", token="hf_" + "x" * 30)
    hub.tokens["hf_" + "r" * 30] = "read"
    refused(hub, model_folder, "your token may not write there", token="hf_" + "r" * 30)
    assert not hub.repos


@pytest.mark.parametrize(
    "repo", ["tiny", "a/b/c", "", "user/", "../x/y", "user/na me", "user/x\n", "user/a..b", "user/x.git"]
)
def test_a_name_that_is_none(hub, model_folder, repo):
    refused(hub, model_folder, "not the name of a repository; it must be user/name", repo=repo)
    assert not hub.requests


# What is there already ---------------------------------------------------------------------------------------------


def test_another_model_is_replaced_only_when_asked(hub, model_folder, own_folder):
    push_folder(model_folder, NAME, MIT)
    repo = hub.repos[NAME]
    files = repo.commits[repo.branches["main"]]
    extra = {
        "model-00001-of-00002.safetensors": (b"old", True),
        "LICENSE": (b"text", False),
        "config.json": (b"{}", False),
    }
    repo.commit("main", {**files, **extra})
    text = refused(hub, own_folder, "holds another model already .*--replace")
    assert "config.json" in text
    assert "model-00001-of-00002.safetensors" in text
    commits = len(repo.commits)
    done = push_folder(own_folder, NAME, MIT, replace=True)
    assert len(repo.commits) == commits + 1
    assert done.removed == ("model-00001-of-00002.safetensors",)
    assert done.kept == ("LICENSE",)
    assert hub.files(NAME).pop("LICENSE") == b"text"
    assert set(hub.files(NAME)) == {*on_disk(own_folder), "README.md", "LICENSE"}


def test_a_card_that_somebody_wrote_is_not_lost(hub, model_folder):
    push_folder(model_folder, NAME, MIT)
    repo = hub.repos[NAME]
    files = repo.commits[repo.branches["main"]]
    repo.commit("main", {**files, "README.md": (b"# My notes", False)})
    refused(hub, model_folder, r"its README.md was written or edited by hand; pass your version of it with --card")
    push_folder(model_folder, NAME, MIT, replace=True)
    assert_whole(hub, model_folder)
    edited = hub.files(NAME)["README.md"].replace(b"## Limits", b"Mine.\n\n## Limits")
    repo.commit("main", {**repo.commits[repo.branches["main"]], "README.md": (edited, False)})
    refused(hub, model_folder, "edited by hand", fields=CardFields(license="mit", language=("en",)))


def test_a_pull_request_leaves_the_main_branch_alone(hub, model_folder):
    hub.repos[NAME] = repo = _empty(hub)
    repo.commit("main", {"config.json": (b"{}", False)})
    done = push_folder(model_folder, NAME, MIT, create_pr=True)
    assert done.url == f"{hub.url}/{NAME}/discussions/1"
    assert hub.files(NAME) == {"config.json": b"{}"}
    assert_whole(hub, model_folder, revision="refs/pr/1")
    refused(hub, model_folder, "leave out the revision", create_pr=True, revision="other")


def test_a_branch(hub, model_folder):
    push_folder(model_folder, NAME, MIT, revision="v1")
    assert hub.files(NAME) == {}
    assert_whole(hub, model_folder, revision="v1")
    assert push_folder(model_folder, NAME, MIT, revision="v1").unchanged


def test_private_is_private(hub, model_folder):
    push_folder(model_folder, NAME, MIT, private=True)
    assert hub.repos[NAME].private
    push_folder(model_folder, "user/public", MIT)
    refused(hub, model_folder, "exists and is public", repo="user/public", private=True)


def _empty(hub):
    from tests.hub_server import Repo

    repo = Repo()
    repo.commit("main", {})
    return repo


# Files ---------------------------------------------------------------------------------------------------------------


def flip(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))


def edit(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 7}))


def dense(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def note(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "does not match its checksum"),
        (edit, "config.json: is not the one that was saved"),
        (dense, "not compressed"),
        (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors"),
        (note("compression_report.jsonl", "{}"), "compression_report.jsonl: is not the one that was saved"),
        (note("pytorch_model.bin", ""), "pytorch_model.bin may run code"),
        (note("diary.docx", ""), "diary.docx is no file of a model"),
        (note("notes.md", "token hf_" + "a" * 34), "notes.md holds an access token"),
        (note("notes.md", "see /home/alice/data"), "notes.md names a place on this machine"),
        (note("notes.md", r"see C:\Users\alice\data"), "notes.md names a place on this machine"),
        (note("notes.md", "-----BEGIN RSA PRIVATE KEY-----"), "notes.md holds a private key"),
        (note("added.json", "{"), "added.json is not valid JSON"),
        (lambda folder: (folder / "more.json").symlink_to(folder / "config.json"), "more.json is a link"),
        (note("a<b>.json", "{}"), "not a name for a file"),
    ],
)
def test_a_folder_that_is_not_as_it_was_saved_or_says_too_much(hub, own_folder, change, message):
    change(own_folder)
    refused(hub, own_folder, message)
    assert not hub.requests


def test_the_token_itself_and_the_folder_in_a_header(hub, own_folder):
    metadata = {"format": "pt", "from": str(own_folder)}
    save_file(load_file(own_folder / WEIGHTS), own_folder / "extra.safetensors", metadata=metadata)
    (own_folder / "notes.txt").write_text(f"push with {hub.token}")
    (own_folder / "tokenizer.json").write_text(json.dumps({"vocab": {"/home/user/": 1, "/tmp/": 2}}))
    text = refused(hub, own_folder, "notes.txt holds an access token")
    assert "extra.safetensors names a place" in text
    assert "tokenizer.json" not in text


def test_a_file_that_the_hub_would_not_take(hub, model_folder, monkeypatch):
    monkeypatch.setattr(preflight, "LARGEST_FILE", 100_000)
    refused(hub, model_folder, rf"{WEIGHTS} has 160.9 kB; save smaller shards \(--max-shard-size")
    assert not hub.requests


def test_hidden_files_stay_here(hub, own_folder):
    (own_folder / ".env").write_text("HF_TOKEN=hf_" + "a" * 34)
    (own_folder / ".git").mkdir()
    (own_folder / ".git" / "config").write_text("x")
    assert push_folder(own_folder, NAME, MIT).left_out == (".env", ".git/config")
    assert not any(name.startswith(".") for name in hub.files(NAME))


def test_base_model_and_licence_must_be_known(hub, own_folder):
    refused(hub, own_folder, "license is not known; give --license", fields=CardFields())
    (own_folder / "compression_run.json").write_text('{"base_model": "<script>"}')
    refused(hub, own_folder, "compression_run.json")
    (own_folder / "SHA256SUMS").unlink()
    refused(hub, own_folder, "is not as a run writes it")
    (own_folder / "compression_run.json").unlink()
    refused(hub, own_folder, "base_model is not known; give --base-model")
    assert not hub.repos


def test_the_licence_comes_from_the_base_model(hub, model_folder):
    hub.repos["org/model"] = repo = _empty(hub)
    repo.commit("main", {"README.md": (b"---\nlicense: apache-2.0\n---\n", False)})
    push_folder(model_folder, NAME)
    assert "license: apache-2.0" in hub.files(NAME)["README.md"].decode()


def test_a_card_of_ones_own(hub, model_folder):
    push_folder(model_folder, NAME, MIT)
    page = hub.files(NAME)["README.md"].decode() + "\n## My words\n"
    push_folder(model_folder, NAME, text=page)
    assert hub.files(NAME)["README.md"].decode() == page
    refused(hub, model_folder, "edited by hand")  # words of a person are not lost to a later push
    for change, message in (
        (lambda text: text.replace("license: mit\n", ""), "license is missing"),
        (lambda text: text + "\nhf_" + "a" * 34, "the card holds an access token"),
        (lambda text: text.removeprefix("---"), "must begin with a front matter"),
    ):
        refused(hub, model_folder, message, fields=None, text=change(page))


def test_messages_of_a_server_are_cut_and_cleaned():
    found = scrubbed("a\u001b[31m\nhf_" + "b" * 40 + " https://x.y/z?X-Amz-Signature=s " + "c" * 999)
    assert found.startswith("a [31m (token) https://x.y/z ccc")
    assert len(found) == 301


def test_the_server_compares_as_git_and_lfs_do(hub, model_folder):
    """What the comparison after a push relies on: both names of a content."""
    push_folder(model_folder, NAME, MIT)
    config = hub.files(NAME)["config.json"]
    name = hashlib.sha1(b"blob %d\0" % len(config) + config, usedforsecurity=False).hexdigest()
    assert module._hashes_of(io.BytesIO(config)) == (hashlib.sha256(config).hexdigest(), name)
