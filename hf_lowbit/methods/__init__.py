"""The papers' mathematics, one folder a method; each registers itself with one call.

What a method compresses, how far, with which data, and whom to cite: :mod:`hf_lowbit.methods.taxonomy`, whose names
are offered here as well.
"""

from hf_lowbit.methods import records as _records  # noqa: F401  they enter themselves into the table
from hf_lowbit.methods.taxonomy import (
    CATEGORIES,
    METHODS,
    SUBCATEGORIES,
    Category,
    MethodInfo,
    Subcategory,
    as_table,
    bibtex,
    find,
    get,
    register,
)

__all__ = [
    "CATEGORIES",
    "METHODS",
    "SUBCATEGORIES",
    "Category",
    "MethodInfo",
    "Subcategory",
    "as_table",
    "bibtex",
    "find",
    "get",
    "register",
]
