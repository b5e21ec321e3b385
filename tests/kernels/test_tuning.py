"""The tables of launch settings: rules of choice, and the shipped files."""

import itertools
import json

import pytest

from hf_lowbit.kernels import tuning
from hf_lowbit.kernels.tuning import Settings

ROW = {"block_n": 64, "block_m": 16, "num_warps": 4, "num_stages": 3, "programs_per_core": 2}
FILES = sorted(tuning.FOLDER.glob("*.json"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of settings, with nothing remembered from before."""
    for cached in (tuning.table, tuning.choose):
        cached.cache_clear()
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    yield tmp_path
    for cached in (tuning.table, tuning.choose):
        cached.cache_clear()


def write(folder, name, *rows):
    (folder / name).write_text(json.dumps([{**ROW, **row} for row in rows]))


def test_the_first_row_that_fits_wins(folder):
    write(
        folder,
        "some.json",
        {"bits": 32, "num_warps": 1},
        {"batch": 16, "in_features": 100, "num_warps": 2},
        {"batch": 16, "num_warps": 3},
        {"out_features": 50, "num_warps": 4},
        {"num_warps": 5},
    )
    warps = {
        (32, 1, 1, 1): 1,
        (16, 16, 999, 100): 2,
        (16, 16, 999, 101): 3,
        (16, 17, 50, 999): 4,
        (16, 17, 51, 999): 5,
    }
    assert {problem: tuning.choose("some", (), *problem).num_warps for problem in warps} == warps


def test_the_most_specific_device_comes_first(folder):
    write(folder, "some.json", {"num_warps": 1})
    write(folder, "some.sm_90.json", {"batch": 64, "num_warps": 2})
    write(folder, "some.big-gpu-80gb.json", {"batch": 1, "num_warps": 4})
    devices = (tuning.slug("Big GPU (80GB)"), "sm_90", "cuda")
    assert [tuning.choose("some", devices, 16, batch, 1, 1).num_warps for batch in (1, 64, 65)] == [4, 2, 1]


def test_no_row_that_fits_is_an_error(folder):
    write(folder, "some.json", {"batch": 1})
    with pytest.raises(LookupError, match=r"some\.json"):
        tuning.choose("some", (), 16, 2, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warps": 4}, r"unknown \['warps'\]"),
        ({"block_n": 0}, r"not positive \['block_n'\]"),
        ({"block_n": True}, r"not positive \['block_n'\]"),
        ({"batch": "16"}, r"not positive \['batch'\]"),
    ],
)
def test_a_bad_row_is_named(change, message):
    with pytest.raises(ValueError, match=r"here, row 1: .*" + message):
        tuning.parse([ROW, {**ROW, **change}], "here")


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match=r"missing \['num_warps'\]"):
        tuning.parse([{key: value for key, value in ROW.items() if key != "num_warps"}], "here")


def test_slug_stays_in_its_folder():
    assert tuning.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert tuning.slug("../../Evil/GPU") == "evil-gpu"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_files_are_sound(path):
    rows = tuning.parse(json.loads(path.read_text()), path.name)
    for row in rows:
        for size in (row.settings.block_n, row.settings.block_m, row.settings.num_warps):
            assert size.bit_count() == 1  # Triton wants powers of two
        assert row.settings.block_m >= min(16, row.batch or 16)
    if path.stem.count(".") == 0:
        assert rows[-1].fits(16, 2**31, 2**24, 2**24)  # else some problem has no settings
        assert rows[-1].fits(32, 2**31, 2**24, 2**24)


def test_files_are_shipped():
    assert {path.name for path in FILES} >= {"binary.json", "binary.hip.json", "binary.sm_90.json"}


def test_split_count():
    sizes = ((1, 2, 7, 64, 500), (1, 2, 5, 32, 86), (1, 8, 132), (1, 4))
    for tiles, groups, cores, programs in itertools.product(*sizes):
        splits = tuning.split_count(tiles, groups, cores, programs)
        per_split = -(-groups // splits)
        assert 1 <= splits <= groups
        assert (splits - 1) * per_split < groups  # the last piece is not empty
        assert splits == 1 or tiles * splits <= cores * programs  # never more programs than wanted
    assert tuning.split_count(64, 32, 132, 4) == 8
    assert tuning.split_count(64, 1, 132, 4) == 1
    assert tuning.split_count(1, 5, 132, 4) == 5


def test_settings_are_what_the_rows_say():
    (row,) = tuning.parse([ROW], "here")
    assert row.settings == Settings(64, 16, 4, 3, 2)
