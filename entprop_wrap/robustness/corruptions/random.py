"""Random numbers by the seed of an image and a position only, equal on every device and at every batch size.

torch's own generators give other numbers on a GPU, and other numbers for 8 images than for 4 + 4. Here each image takes
one 64-bit seed from the caller's CPU generator; everything else is a hash of that seed and a counter, in integer
arithmetic on the device of the images: a two-round keyed mix by the 32-bit finaliser of C. Wellons, "Prospecting for
Hash Functions" (2018), of the lowest measured avalanche bias of its form. It is made for images, not for secrets.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from entprop_wrap.utils.options import check_generator

# As signed 32-bit integers, which wrap around in torch on every device.
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - 2**32

# 23 bits and a half fill a float32 exactly: never 0 and never 1, and the same value in float64.
_BITS = 23


class Draws:
    """A stream of random numbers for each image of a batch ``(N, ...)``, of its device and dtype.

    The generator, on the CPU, gives ``N`` seeds at the first draw, in the order of the images; None: torch's default.
    """

    def __init__(self, pixels: Tensor, generator: torch.Generator | None) -> None:
        check_generator(generator)
        self._pixels, self._generator, self._position = pixels, generator, 0

    @functools.cached_property
    def _keys(self) -> Tensor:
        seeds = _image_seeds(len(self._pixels), self._generator)
        # The high half first, by an arithmetic shift; the low half re-centred into the range of int32.
        keys = torch.stack([seeds >> 32, (seeds & 0xFFFFFFFF) - 2**31]).to(torch.int32)
        return keys.to(self._pixels.device).unsqueeze(-1)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw ``(N, *shape)`` uniform values from the open interval ``(low, high)``."""
        values = self._integers(math.prod(shape)).bitwise_right_shift_(32 - _BITS).bitwise_and_(2**_BITS - 1)
        unit: Tensor = values.to(self._pixels.dtype).add_(0.5).mul_(2.0**-_BITS)
        if (low, high) != (0.0, 1.0):
            unit = unit.mul_(high - low).add_(low)
        return unit.view(-1, *shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw ``(N, *shape)`` standard normal values by the transform of Box and Muller (1958); they end at 5.8."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = self.uniform((half,)).log_().mul_(-2.0).sqrt_()
        angle = self.uniform((half,), 0.0, 2.0 * math.pi)
        pairs = torch.stack([angle.cos(), angle.sin_()], dim=1).mul_(radius.unsqueeze(1))
        return pairs.flatten(1)[:, :count].reshape(-1, *shape)

    def below(self, bound: int, shape: Sequence[int]) -> Tensor:
        """Draw ``(N, *shape)`` integers (int32) from 0 to ``bound - 1``, each as likely within ``bound / 2**16``."""
        return (((self._integers(math.prod(shape)) >> 16) & 0xFFFF) * bound >> 16).view(-1, *shape)

    def _integers(self, count: int) -> Tensor:
        """The next ``count`` 32-bit integers of every stream, ``(N, count)``, int32."""
        first, second = self._keys
        counter = torch.arange(self._position, self._position + count, device=first.device)
        self._position += count
        mixed = _mix(counter.to(torch.int32) + first)
        return _mix(mixed.bitwise_xor_(second))


class Streams:
    """Random numbers of an evaluation: a stream of image seeds for each purpose, such as ``("fog", 3)``."""

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
        _image_seeds(position - drawn, generator)
        self._streams[purpose] = generator, position
        return torch.Generator().set_state(generator.get_state())


def _image_seeds(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def _mix(values: Tensor) -> Tensor:
    """Scramble int32 values in place, one to one; the masks make the shifts logical ones."""
    values.bitwise_xor_((values >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    values.bitwise_xor_((values >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    return values.bitwise_xor_((values >> 16).bitwise_and_(0xFFFF))
