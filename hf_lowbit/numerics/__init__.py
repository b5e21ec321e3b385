"""Mathematics that two methods or more share: tensors in, tensors out."""
