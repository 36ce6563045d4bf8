"""Our entropic retraining, naive and in float64: loops over images, layers, channels and positions."""

import math

from torch import Tensor, nn

from tests.reference.networks import Networks, Outcome, entropy, mean_loss


def evenness(activation: Tensor) -> Tensor:
    """Of one image's activations, channels first: entropy of the channels' shares of its energy, 1 if all alike."""
    energies = [sum(value * value for value in channel.flatten()) / channel.numel() for channel in activation]
    total = sum(energies)
    return -sum(energy / total * (energy / total).log() for energy in energies) / math.log(len(energies))


def step(
    module: nn.Module,
    main: dict[str, Tensor],
    auxiliary: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    layers: dict[str, bool],
    activation_weight: float,
    output_weight: float,
) -> Outcome:
    """``layers`` are the names of the norm layers, and whether their channels come last."""
    nets, seen = Networks(module, main, auxiliary), {}
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
        for name in layers
    ]
    logits = nets.main(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for name, last in layers.items():
        for activation in seen[name]:
            first = activation.movedim(-1, 0) if last else activation
            total = total + evenness(first) / len(images) / len(layers)
    main_loss = mean_loss(logits, labels)
    loss = main_loss - output_weight * sum(map(entropy, logits)) / len(logits) - activation_weight * total
    return nets.outcome(
        len(images),
        nets.gradients(loss),
        loss=loss,
        main_loss=main_loss,
        logits=logits,
        aux_loss=None,
        aux_logits=None,
        aux_images=None,
    )
