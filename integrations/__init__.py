"""Bridges to other libraries. Within ``entprop_wrap``, only the command line imports from here."""
