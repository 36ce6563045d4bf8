"""Keys of copies by their text, for test models whose own layers are not called ``entprop_*``."""


def is_auxiliary_key(key: str) -> bool:
    """Whether ``key`` is that of a copy."""
    return any(part.startswith("entprop_") for part in key.split("."))


def original_name(key: str) -> str:
    """The key of what ``key`` is a copy of; others stay as they are."""
    return ".".join(part for part in key.split(".") if not part.startswith("entprop_"))
