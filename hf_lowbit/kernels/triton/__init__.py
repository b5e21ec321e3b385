"""Kernels in Triton for CUDA and ROCm devices, one module per format.

The modules below import Triton, which exists for Linux only; nothing imports them until a tensor on such a device
arrives. This file imports nothing.
"""
