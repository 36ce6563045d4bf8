"""Bridges to other libraries. Nothing in ``entprop_wrap`` imports from here."""
