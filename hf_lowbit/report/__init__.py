"""What a compressed model is made of and how good it is: sizes from file headers, quality and speed by measuring."""
