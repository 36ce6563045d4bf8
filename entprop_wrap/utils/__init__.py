"""Helpers that know nothing of the method: options, module trees, model outputs, features, statistics, tensors."""
