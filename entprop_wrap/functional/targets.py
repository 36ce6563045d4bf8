"""The labels of a batch, of which each image may have two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.losses import Loss
from entprop_wrap.functional.mixing import Mix, Mixer
from entprop_wrap.utils.options import is_number, shown
from entprop_wrap.utils.tensors import index_rows, to_device

__all__ = ["Target", "mix_batch"]


class Target:
    """The labels of a batch, and, for mixed images, those of their partners.

    The loss of a two-label target is ``share * loss(logits, labels) + (1 - share) * loss(logits, partner labels)``,
    which needs nothing of the loss but that it takes labels. Source: MixUp (Zhang et al., ICLR 2018), official code.

    Args:
        labels: ``(n,)`` or ``(n, C)``.
        partners: Labels of the partners, in the same form.
        share: Weight of the first labels, in [0, 1].
        index: ``(n,)``: where the labels stand in the batch; None: they are its first n.
        partner_index: Where the partners' do.
    """

    def __init__(
        self,
        labels: Tensor,
        partners: Tensor | None = None,
        share: float = 1.0,
        index: Tensor | None = None,
        partner_index: Tensor | None = None,
    ) -> None:
        self.labels, self.partners, self.share = labels, partners, share
        self.index, self.partner_index = index, partner_index

    @classmethod
    def mixed(cls, labels: Tensor, partner: Tensor, share: float, index: Tensor | None = None) -> Target:
        """Return the two-label target of images that were mixed with their partners ``(n,)``."""
        partner = to_device(partner, labels.device)
        return cls(labels, index_rows(labels, partner), share, index, partner if index is None else index[partner])

    def rows(self, rows: Tensor) -> Target:
        """Return the target of the selected ``rows``."""
        index = rows if self.index is None else self.index[rows]
        partners, partner_index = (None if x is None else x[rows] for x in (self.partners, self.partner_index))
        return Target(self.labels[rows], partners, self.share, index, partner_index)

    def loss(self, loss: Loss, logits: Tensor) -> Tensor:
        """Return the scalar loss of ``logits`` ``(N, C)``."""
        own = _at(loss, self.index)(logits, self.labels)
        if self.partners is None:
            return own
        return self.share * own + (1 - self.share) * _at(loss, self.partner_index)(logits, self.partners)


def mix_batch(
    mixer: Mixer, images: Tensor, target: Target, generator: torch.Generator | None
) -> tuple[Mix, Tensor, Target]:
    """Draw a mix for ``images`` ``(N, C, H, W)`` with one label each; return it, the mixtures and their target."""
    mix, version = mixer.draw(images.shape, generator), images._version
    mixed: Any = mix.apply(images)
    share: Any = mix.share.item() if isinstance(mix.share, Tensor) and mix.share.ndim == 0 else mix.share
    if (
        not (isinstance(mixed, Tensor) and mixed.shape == images.shape and mixed.dtype == images.dtype)
        or images._version != version
        or not (isinstance(mix.partner, Tensor) and mix.partner.shape == images.shape[:1])
        or not (is_number(share) and 0 <= share <= 1)
    ):
        raise ConfigurationError(
            f"{type(mixer).__name__}.draw() must return a mix of {len(images)} images: a partner for each, one share "
            "in [0, 1] as a number, and apply(), which returns as many images of the same type and changes none in "
            f"place; found partner={shown(mix.partner)}, share={shown(share)} and {shown(mixed)} from apply()."
        )
    return mix, mixed, Target.mixed(target.labels, mix.partner, share, target.index)


def _at(loss: Loss, index: Tensor | None) -> Loss:
    """Return ``loss`` for labels that stand at ``index``, if it wants to know."""
    at: Callable[[Tensor | None], Loss] | None = getattr(loss, "at", None)
    return loss if at is None or index is None else at(index)
