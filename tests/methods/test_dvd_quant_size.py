"""Bytes of a transformer of Wan2.1-1.3B's shape, counted without weights."""

from benchmarks.quality import video


def test_a_large_transformer_is_far_smaller():
    found = video.size(write=False)
    assert found["parameters"] == 1_418_996_800
    row = found["figures"]["default"]
    assert row["layers"] == 300
    assert row["times_smaller"] > 3.3
    # all linear layers of the blocks; scales, zero points and factors of columns count
    assert 4.3 < row["bits_per_weight"] < 4.33
