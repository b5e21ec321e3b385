"""Bytes of a transformer of Wan2.1-1.3B's shape, counted without weights."""

from benchmarks.quality import video


def test_a_large_transformer_is_far_smaller():
    found = video.size(write=False)
    assert found["parameters"] == 1_418_996_800
    rows = found["figures"]
    assert {row["layers"] for row in rows.values()} == {300}  # all linear layers of the blocks
    # 4 bits, and for each 32 columns a scale and a zero point; with factors of all columns it is a little less
    assert rows["default, no column stands out"]["times_smaller"] > 3.3
    assert 3.29 < rows["default"]["times_smaller"] < rows["group_size=64"]["times_smaller"]
    assert 4.625 < rows["default"]["bits_per_weight"] < 4.64
