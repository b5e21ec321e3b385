"""``python -m hf_lowbit`` is the command line; ``torchrun ... -m hf_lowbit`` runs it in several processes."""

from hf_lowbit.cli import main

main()
