"""Marks of tests that need a compiled library; test_libraries.py fails where one is missing that could be there."""

import pytest


def needs(load):
    """Return the mark of tests that cannot run without what ``load``, of a module of ``kernels.cpu``, returns."""
    library, *_, reason = load()
    return pytest.mark.skipif(library is None, reason=f"no compiled library: {reason}")
