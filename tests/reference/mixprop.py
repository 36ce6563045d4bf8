"""One MixProp step (Zhang et al., BMVC 2022, as section 4.1.3 of EntProp describes it), naive and in float64."""

from torch import Tensor, nn

from tests.reference.entprop import Blend
from tests.reference.networks import Networks, Outcome, mean_loss


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    blend: Blend,
    weight: float = 1.0,
) -> Outcome:
    """The clean batch through the main network, its ``blend`` through the auxiliary one."""
    nets = Networks(module, main, auxiliary)
    logits = nets.main(images)
    main_loss = mean_loss(logits, labels)
    mixed = blend(images)
    aux_logits = nets.auxiliary(mixed)
    partners = labels[list(blend.partner)]
    aux_loss = blend.share * mean_loss(aux_logits, labels) + (1 - blend.share) * mean_loss(aux_logits, partners)
    loss = main_loss + weight * aux_loss
    return nets.outcome(
        len(images),
        nets.gradients(loss),
        loss=loss,
        main_loss=main_loss,
        logits=logits,
        aux_loss=aux_loss,
        aux_logits=aux_logits,
        aux_images=mixed,
    )
