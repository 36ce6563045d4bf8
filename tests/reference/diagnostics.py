"""Naive versions of the diagnostics: loops, definitions, scipy. No code shared with the package."""

import numpy as np
import scipy.linalg
import torch


def entropy(logits):
    """Of one row of logits, in nats."""
    exponentials = [np.exp(float(value) - float(max(logits))) for value in logits]
    probabilities = [value / sum(exponentials) for value in exponentials]
    return -sum(p * np.log(p) for p in probabilities if p > 0)


def auroc(negative, positive):
    """Count all pairs."""
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    return sum(wins) / len(wins)


def fpr95(inside, outside):
    """Try every threshold."""
    for threshold in sorted(inside):
        if sum(score <= threshold for score in inside) * 100 >= 95 * len(inside):
            return sum(score <= threshold for score in outside) / len(outside)
    raise AssertionError


def frechet(a, b):
    """Square root of a matrix by scipy."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))


def jacobian(model, image, std):
    """Entry by entry of one image ``(C, H, W)``: classes x pixels, with respect to pixels in [0, 1]."""
    with torch.no_grad():
        rows = len(model(image[None])[0])
    found = np.zeros((rows, image.numel()))
    for row in range(rows):
        leaf = image[None].clone().requires_grad_()
        model(leaf)[0, row].backward()
        for channel in range(len(image)):
            for y in range(image.shape[1]):
                for x in range(image.shape[2]):
                    place = np.ravel_multi_index((channel, y, x), image.shape)
                    found[row, place] = float(leaf.grad[0, channel, y, x]) / std[channel]
    return found


def symmetric_divergence(mean, var, other_mean, other_var):
    """Of two normal distributions, from the textbook's formula for one direction."""

    def one(m, v, n, w):
        return 0.5 * (np.log(w / v) + (v + (m - n) ** 2) / w - 1)

    return (one(mean, var, other_mean, other_var) + one(other_mean, other_var, mean, var)) / 2
