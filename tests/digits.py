"""The digits of scikit-learn, and small networks that learn them: the example's, so that both show the same."""

from examples.binary_convs import VARIANTS, digits, train


def accuracies(variants, seed, epochs):
    """Return the test accuracy of each variant after so many epochs."""
    data = digits()
    return {name: train(VARIANTS[name], data, seed, epochs)[1] for name in variants}
