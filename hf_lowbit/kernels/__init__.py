"""Ops that multiply by packed weights: schema, shape rule, plain-torch reference (and, later, fast kernels).

Nothing here knows a module, a config or a method. Importing registers the ops with ``torch.library``.
"""

from hf_lowbit.kernels import activation as activation
from hf_lowbit.kernels import integer as integer
from hf_lowbit.kernels import low_rank as low_rank
from hf_lowbit.kernels import ops as ops
from hf_lowbit.kernels.planes import pack_plane, padded_columns, plane_bytes, unpack_plane

__all__ = ["pack_plane", "padded_columns", "plane_bytes", "unpack_plane"]
