"""Robustness, measured."""
