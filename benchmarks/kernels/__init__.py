"""Speed of single products, and what compiled kernels contain."""
