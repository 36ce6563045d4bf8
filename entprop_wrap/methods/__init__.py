"""Training methods: one file, one method, one frozen dataclass with one ``step``."""
