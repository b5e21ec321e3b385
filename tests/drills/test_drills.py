"""Every drill runs, small: that the requirements are met at full size, ``python -m tests.drills`` says."""

import pytest

from tests.drills.__main__ import DRILLS


@pytest.mark.parametrize("name", DRILLS)
def test_drill(name):
    found = DRILLS[name](True)
    assert found["checks"]
    assert [check for check in found["checks"] if check["met"] is False] == [], found
