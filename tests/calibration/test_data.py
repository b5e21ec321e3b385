"""Where calibration tokens come from: every kind of source, the same tokens every time, and clear refusals."""

import hashlib
import itertools
import struct
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from hf_lowbit import ARBConfig, CalibrationError, CalibrationRecord
from hf_lowbit.calibration.data import calibration_tokens, load_texts, sample_sequences, tokenize

VOCABULARY = 1000


@pytest.fixture(scope="module")
def tokenizer():
    """Words "w3" to "w999" are ids 3 to 999; like many real ones it puts a start token before a text when asked."""
    words = {"<s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", unk_token="<unk>", model_max_length=8)


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def run(tokenizer, calibration, samples=3, length=4, seed=0, vocabulary=VOCABULARY):
    config = ARBConfig(calibration=calibration, samples=samples, sequence_length=length, seed=seed)
    return calibration_tokens(config, tokenizer, vocabulary)


def digest(tokens):
    numbers = tokens.flatten().tolist()
    return hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).hexdigest()


# Texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
def test_texts_as_they_are(kind):
    assert load_texts(kind(["one", " ", "", "two\n\nlines"])) == ["one", "two\n\nlines"]


def test_file_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "any.name"
    path.write_bytes("first line\nsecond line\n\nGrüße\r\n\r\n\n\n   \n\nlast".encode())
    assert [text.strip() for text in load_texts(str(path))] == ["first line\nsecond line", "Grüße", "last"]


def test_folder_is_read_in_order_of_names(tmp_path):
    for name in ("b.txt", "a.md", "inner/c.text"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n\nstill {name}", "utf-8")
    for name in ("d.bin", "e.json", "f"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("\n", "utf-8")
    assert load_texts(str(tmp_path)) == [
        f"text of {name}\n\nstill {name}" for name in ("a.md", "b.txt", "inner/c.text")
    ]


def test_source_that_is_not_there(tmp_path):
    with pytest.raises(CalibrationError, match=r"'.*nothing' is neither a file or folder .*c4, wikitext2"):
        load_texts(str(tmp_path / "nothing"))


def test_empty_sources(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n \n", "utf-8")
    (tmp_path / "folder").mkdir()
    for data, name in [
        ([], "list of texts"),
        (["", " \n"], "list of texts"),
        (str(tmp_path / "blank.txt"), "'blank.txt'"),
        (str(tmp_path / "folder"), "'folder'"),
    ]:
        with pytest.raises(CalibrationError, match=f"{name} is empty"):
            load_texts(data)


@pytest.mark.parametrize("in_folder", [False, True])
def test_other_encodings_name_the_file(tmp_path, in_folder):
    (tmp_path / "good.txt").write_text("fine", "utf-8")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"cannot read 'latin\.txt' as UTF-8"):
        load_texts(str(tmp_path if in_folder else tmp_path / "latin.txt"))


# Datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the package of this name, which the tests need neither installed nor a network for."""
    module = types.ModuleType("datasets")
    module.load_dataset = None
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_dataset_without_a_network_says_what_to_do(datasets, monkeypatch, name):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CalibrationError, match=rf"'{name}' .*ConnectionError.*pass a text file, a folder or a list"):
        load_texts(name)


def test_dataset_that_breaks_while_it_is_read(datasets, monkeypatch):
    def rows(*args, **kwargs):
        yield {"text": "fine"}
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(CalibrationError, match="TimeoutError"):
        load_texts("c4")


def test_dataset_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'hf-lowbit\[eval\]'.*a text file or a list of strings"):
        load_texts("c4")


@pytest.mark.parametrize(
    ("name", "repository", "part", "splits", "column"),
    [
        ("c4", "allenai/c4", "en", ("train", "validation"), "text"),
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", ("train", "test"), "text"),
    ],
)
def test_dataset_and_its_splits(datasets, monkeypatch, name, repository, part, splits, column):
    asked = []

    def load(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return iter([{column: f"one of {kwargs['split']}"}, {column: "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_texts(name) == [f"one of {splits[0]}", "two"]
    assert load_texts(name, heldout=True) == [f"one of {splits[1]}", "two"]
    assert asked == [(repository, part, split) for split in splits]


def test_endless_dataset_is_only_read_at_its_start(datasets, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: itertools.repeat({"text": "x" * 10**6}))
    assert 1 < len(load_texts("c4")) < 100


def test_dataset_in_the_record(tokenizer, datasets, monkeypatch):
    rows = [{"text": words(*range(3, 40))}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(rows))
    tokens, record = run(tokenizer, "wikitext2")
    assert record == CalibrationRecord(kind="dataset", name="wikitext2", sha256=digest(tokens), tokens=12)


# Tokens and samples ----------------------------------------------------------------------------------------------


def test_texts_become_one_stream(tokenizer):
    stream = tokenize([words(5, 6), words(7), words(*range(10, 30))], tokenizer)
    assert stream.dtype == torch.int64
    assert stream.tolist() == [5, 6, 7, *range(10, 30)]  # no start token, not cut at the model's maximum


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(2, 200),
    samples=st.integers(1, 40),
    length=st.integers(2, 30),
    seed=st.integers(0, 2**40),
)
def test_samples_are_pieces_of_the_stream(total, samples, length, seed):
    stream = torch.arange(total)
    if total < length:
        with pytest.raises(CalibrationError, match=f"{total} tokens, too few for one sequence of {length}"):
            sample_sequences(stream, samples, length, seed)
        return
    found = sample_sequences(stream, samples, length, seed)
    assert tuple(found.shape) == (samples, length)
    starts = found[:, 0]
    assert torch.equal(found, starts[:, None] + torch.arange(length))
    windows = total // length
    if windows >= samples:
        assert (starts % length == 0).all()
        assert (starts[1:] > starts[:-1]).all()  # in order of the stream, none twice
    else:
        assert starts[:windows].tolist() == list(range(0, windows * length, length))
    assert torch.equal(found, sample_sequences(stream, samples, length, seed))


def test_samples_are_the_same_on_every_machine():
    """Fixed here, so that a change of the draw, which changes every calibrated model, is noticed."""
    stream = torch.arange(1000)
    assert sample_sequences(stream, 5, 10, 0)[:, 0].tolist() == [190, 440, 710, 900, 930]
    assert sample_sequences(stream, 5, 10, 1)[:, 0].tolist() == [150, 320, 350, 450, 900]


def test_sampling_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    sample_sequences(torch.arange(100), 20, 10, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_window_is_drawn_by_some_seed():
    stream = torch.arange(40)
    seen = {start for seed in range(50) for start in sample_sequences(stream, 1, 10, seed)[:, 0].tolist()}
    assert seen == {0, 10, 20, 30}


# The whole way ---------------------------------------------------------------------------------------------------


def test_text_sources_of_one_content_give_the_same_tokens(tokenizer, tmp_path):
    texts = [words(*range(start, start + 30)) for start in (100, 200, 300)]
    (tmp_path / "file.txt").write_text("\n\n".join(texts), "utf-8")
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number}.txt").write_text(text, "utf-8")
    found = {
        kind: run(tokenizer, data, samples=5, length=8)
        for kind, data in [
            ("texts", texts),
            ("text file", tmp_path / "file.txt"),
            ("text folder", str(tmp_path / "folder")),
        ]
    }
    expected = sample_sequences(
        torch.tensor([*range(100, 130), *range(200, 230), *range(300, 330)]), samples=5, length=8, seed=0
    )
    for kind, (tokens, record) in found.items():
        assert torch.equal(tokens, expected)
        assert record == CalibrationRecord(kind=kind, name=None, sha256=digest(expected), tokens=40)


def test_seed_changes_the_draw_and_the_hash(tokenizer):
    texts = [words(*range(3, 900))]
    first, same, other = (run(tokenizer, texts, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], same[0])
    assert first[1] == same[1]
    assert not torch.equal(first[0], other[0])
    assert first[1].sha256 != other[1].sha256


TOKENS = torch.arange(24).view(4, 6) + 3


@pytest.mark.parametrize(
    "data",
    [TOKENS, TOKENS.int(), TOKENS.T.contiguous().T, list(TOKENS), TOKENS.tolist(), tuple(TOKENS.tolist())],
    ids=["tensor", "int32", "strided", "list of tensors", "list of lists", "tuple of lists"],
)
def test_ready_tokens(data):
    tokens, record = run(None, data, samples=9)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, TOKENS)
    assert record == CalibrationRecord(kind="tokens", name=None, sha256=digest(TOKENS), tokens=24)


def test_first_ready_sequences_are_taken():
    tokens, record = run(None, TOKENS, samples=3)
    assert torch.equal(tokens, TOKENS[:3])
    assert (record.tokens, record.sha256) == (18, digest(TOKENS[:3]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[1, 2, 3], [4, 5]], "equally long, got lengths 2 to 3"),
        (torch.tensor([1, 2, 3]), "sequences, length"),
        ([torch.zeros(0, dtype=torch.int64)] * 2, "sequence is empty"),
        (torch.zeros((0, 5), dtype=torch.int64), "is empty"),
        (TOKENS.float(), "must be integers"),
        ([[0.5, 1.5]], "must be integers"),
        (TOKENS > 5, "must be integers"),
        ([["a", "b"]], "not numeric sequences"),
        ([[1, 2], "text"], "not numeric sequences"),
        ([[1, None]], "not numeric sequences"),
        ([[1, 2**70]], "not numeric sequences"),
        ([[3, 4], [5, VOCABULARY]], f"go from 3 to {VOCABULARY}; the model knows 0 to {VOCABULARY - 1}"),
        ([[-1, 4]], f"go from -1 to 4; the model knows 0 to {VOCABULARY - 1}"),
        (b"bytes", "sequences, length|not numeric|integers"),
        (object(), "not numeric sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_tokens(data, message):
    with pytest.raises(CalibrationError, match=message):
        run(None, data)


def test_tokens_of_three_dimensions():
    with pytest.raises(CalibrationError, match="sequences, length"):
        run(None, TOKENS.view(2, 2, 6))


def test_what_a_tokenizer_returns_is_refused_with_advice():
    with pytest.raises(ValueError, match="calibration"):
        run(None, BatchEncoding({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}))


def test_text_beyond_the_model(tokenizer):
    with pytest.raises(CalibrationError, match="go from 3 to 38; the model knows 0 to 29"):
        run(tokenizer, [words(*range(3, 39))], samples=9, vocabulary=30)


def test_text_that_is_too_short(tokenizer):
    with pytest.raises(CalibrationError, match="has 3 tokens, too few for one sequence of 4"):
        run(tokenizer, [words(5, 6, 7)])


def test_text_without_a_tokenizer():
    with pytest.raises(CalibrationError, match=r"needs a tokenizer; pass RunOptions\(tokenizer"):
        run(None, ["some text"])


@pytest.mark.parametrize("data", [None, CalibrationRecord(kind="texts", tokens=5)], ids=["none", "record"])
def test_no_data(data):
    with pytest.raises(CalibrationError, match="names no calibration data"):
        run(None, data)
