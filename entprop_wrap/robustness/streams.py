"""Random numbers for an evaluation: by seed, purpose, and an image's place in the data; not by batch or model."""

from __future__ import annotations

import hashlib

import torch

from entprop_wrap.robustness.corruptions.random import image_seeds

__all__ = ["Streams"]


class Streams:
    """One stream of image seeds for each purpose, such as ``("fog", 3)``, by the ``seed`` of all."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._streams: dict[tuple[object, ...], tuple[torch.Generator, int]] = {}

    def at(self, position: int, *purpose: object) -> torch.Generator:
        """Return a new CPU generator that stands where ``position`` images have been drawn for.

        What is drawn from it does not move the stream, so the answer depends on the arguments alone.
        """
        generator, drawn = self._streams.get(purpose, (None, 0))
        if generator is None or drawn > position:
            # The 0 keeps the draws of results that were published.
            digest = hashlib.sha256(repr((self.seed, *purpose, 0)).encode()).digest()
            generator, drawn = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)), 0
        image_seeds(position - drawn, generator)
        self._streams[purpose] = generator, position
        return torch.Generator().set_state(generator.get_state())
