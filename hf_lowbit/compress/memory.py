"""What the C library is asked so that a long run takes no more memory with every block; nothing but on Linux."""

from __future__ import annotations

import ctypes
import sys

_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def keep_memory_in_pieces() -> None:
    """Let glibc map every large tensor on its own, so that its memory is returned when it is freed.

    By default glibc raises the size from which it does so with the largest piece that was freed, up to 32 MB; then
    the tensors of one block leave holes that those of the next do not fit into, and a run takes more with every block.
    The setting stays for the process; it costs page faults, which the fits of a run outweigh.
    """
    set_option = getattr(_C_LIBRARY, "mallopt", None)
    if set_option is not None:
        set_option(-3, 2**20)  # M_MMAP_THRESHOLD of malloc.h


def give_back_memory() -> None:
    """Let the C library return what was freed; glibc keeps pieces for every thread, which add up over a long run."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)
