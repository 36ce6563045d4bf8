"""What other processes run: ``python -m tests.trainer.growth_programs <function> <arguments>``."""

import os
import sys

import torch

import entprop_wrap as entprop
from entprop_wrap.methods import EntropyAscent, Vanilla
from entprop_wrap.trainer import MaximumEntropyGrowth
from tests.helpers.trainer_toys import BatchNormNet, Images, make

torch.set_num_threads(1)

ASCENT = EntropyAscent(steps=2, step_size=1.0)


def darker(image):
    """Random, and told from no augmentation at all."""
    return image * (0.5 + 0.1 * torch.rand(1))


def growing(folder, *, stop_after=None, stop_growing=None, unit="steps", workers=0, images=20, **options):
    """3 epochs, of 3, 3 and 20 steps if by steps; interrupted in a training batch or a growing one."""
    trained = grown = 0

    def loss(logits, labels):
        nonlocal trained, grown
        if torch.is_grad_enabled():  # and no evaluation
            trained += trainer.model.training
            grown += not trainer.model.training
        if stop_after == trained or stop_growing == grown:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(logits, labels)

    loss.__qualname__, loss.__module__ = "loss", "tests"
    every = {"epochs": 1, "steps": 3}[unit]
    defaults = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.8, "log_every": 3}
    saving = {"save_every_steps": 4, "keep_last": None, "progress": False}
    trainer = entprop.Trainer(
        make(BatchNormNet),
        Images(images, augment=True),
        Images(8, seed=1),
        method=Vanilla(),
        loss=loss,
        growth=MaximumEntropyGrowth(ASCENT, phases=2, every=every, unit=unit, source=Images(images), augment=darker),
        config=entprop.TrainerConfig(output_dir=folder, workers=workers, **{**defaults, **saving, **options}),
    )
    return trainer


def resume(*folders):
    for folder in folders:
        torch.rand(17)  # whatever the new process has done with its random numbers before must not matter
        growing(folder, workers=int(folder.endswith("workers"))).fit(resume=True)


def distributed(folder):
    """Two processes grow and train; then others go on from the middle of the second phase."""
    options = {"unit": "epochs", "images": 24, "save_every_steps": 11}
    whole = growing(f"{folder}/whole", **options)
    whole.fit()
    resumed = growing(f"{folder}/resumed", **options)
    torch.rand(len(folder))
    assert whole._growing.spans == [(0, 3), (1, 6), (2, 12)], whole._growing.spans
    resumed.fit(resume=f"{folder}/whole/checkpoints/step-00000011")
    ends = [trainer.model.state_dict().values() for trainer in (whole, resumed)]
    assert all(map(torch.equal, *ends))
    for one, other in zip(whole._growing.parts, resumed._growing.parts, strict=True):
        assert torch.equal(one["images"], other["images"])
    whole.accelerator.wait_for_everyone()
    # Gloo's threads may abort an interpreter that shuts down while containers hold the group (pytorch#179291).
    os._exit(0)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
