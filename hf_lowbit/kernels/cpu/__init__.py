"""Kernels for processors: a small C++ library, built with the package where there is a compiler."""
