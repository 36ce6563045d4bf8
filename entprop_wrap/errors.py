"""Every error this package raises on purpose, under one base.

A message says what was expected, what was found, and what to write instead. Each class also derives from the
built-in that fits it, so ``except ValueError`` and ``except TypeError`` continue to work.
"""

__all__ = [
    "AlreadyWrappedError",
    "AuxiliaryNameError",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DivergedError",
    "EntPropError",
    "ImageError",
    "LabelError",
    "ModelOutputError",
    "NoNormLayersError",
    "NotWrappedError",
    "OptimizerMismatchError",
    "PixelRangeError",
    "UnsupportedModelError",
]


class EntPropError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(EntPropError, ValueError):
    """An option is out of its range, or two options contradict each other."""


class NoNormLayersError(EntPropError, ValueError):
    """The model has no norm layer to copy: there is nothing for an auxiliary domain to switch."""


class AlreadyWrappedError(EntPropError, ValueError):
    """The model, or a part of it, is wrapped already."""


class NotWrappedError(EntPropError, ValueError):
    """The call needs a model that has been through ``entprop.wrap``."""


class AuxiliaryNameError(EntPropError, ValueError):
    """The name of an auxiliary domain is malformed, or the model has no domain of that name."""


class UnsupportedModelError(EntPropError, RuntimeError):
    """The model is in a state in which switching its norms could not be right."""


class OptimizerMismatchError(EntPropError, ValueError):
    """The optimizer trains a norm layer but not its auxiliary copy: it was built before ``wrap``."""


class ModelOutputError(EntPropError, TypeError):
    """The model did not return logits of shape ``(N, C)``."""


class ImageError(EntPropError, ValueError):
    """A batch of images has the wrong type, shape, layout, or holds values that are not finite."""


class PixelRangeError(ImageError):
    """Pixel values, or an epsilon, do not fit the pixel space."""


class LabelError(EntPropError, ValueError):
    """Labels have the wrong type, shape or range."""


class DataError(EntPropError, ValueError):
    """A dataset is empty, has no labels, or does not have the columns it needs."""


class CheckpointError(EntPropError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another run."""


class DivergedError(EntPropError, ArithmeticError):
    """The loss or the weights are no longer finite: there is nothing left to train."""
