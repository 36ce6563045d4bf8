"""Runs of the Trainer for tests of resuming, and what two processes do together."""

import os
import resource
from pathlib import Path

import torch
from torch.utils.data import DataLoader, default_collate

import entprop_wrap as entprop
from entprop_wrap.methods import EntropyAscent, Vanilla, grow
from entprop_wrap.methods.lagged import lagged_state
from tests.helpers.trainer_toys import BatchNormNet, GroupNormNet, Images, make
from tests.helpers.trainers import trainer

torch.set_num_threads(1)

ASCENT = EntropyAscent(steps=2, step_size=1.0)


def resumable(folder, *, workers=0, stop_after=None):
    """A run of 2 epochs of 3 steps with all that is random or has memory; saved after every second step."""
    batches = 0.0

    def loss(logits, labels):
        nonlocal batches
        batches += 0.5 * (torch.is_grad_enabled() and len(logits) == 2)  # auxiliary passes, for each of two labels
        if stop_after is not None and batches > stop_after:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(logits, labels)

    loss.__qualname__, loss.__module__ = "loss", "tests"
    options = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.8, "workers": workers}
    options |= {"batch_size": 8, "log_every": 3, "save_every_steps": 2, "keep_last": None}
    return trainer(folder, data=Images(augment=True), method=entprop.EntProp(fraction=0.25), loss=loss, **options)


LAGGED = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "ema_decay": 0.8, "channels_last": True},
}


def lagged(folder, kind):
    """A run of 2 epochs of 5 batches, saved after every step; images wait between all of them."""
    options = {"batch_size": 8, "save_every_steps": 1, "keep_last": None, **LAGGED[kind]}
    method = entprop.EntProp(fraction=0.25, lagged=True)
    return trainer(folder, data=Images(augment=True), method=method, **options)


def phased(folder, *, resume=False, stop_after=None):
    """Two phases of 2 epochs: on 20 images, saved after steps 5 and 10, then on 40, saved after 10 and 20."""
    batches = 0

    def loss(logits, labels):
        nonlocal batches
        batches += model.training
        if batches == stop_after:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(logits, labels)

    loss.__qualname__, loss.__module__ = "loss", "tests"
    model, data = make(BatchNormNet), Images(20, augment=True)
    for phase in (1, 2):
        options = {"method": Vanilla(), "loss": loss, "batch_size": 4, "keep_last": None}
        trainer(f"{folder}/phase{phase}", model, data, Images(8), **options).fit(resume=resume)
        if phase == 1:
            data = grow(model, data, ascent=ASCENT, augment=lambda image: image * torch.rand(1), progress=False)
    return model, data


def grow_together(folder):
    """Two processes make a share each, by the statistics of the first; they train on the same data then."""
    model, _ = phased(folder)
    data = Images(20)
    model.bn.running_mean += 0.1 * torch.distributed.get_rank()  # as far as the first does not share its own
    grown = grow(model, data, ascent=ASCENT, batch_size=3, progress=False).datasets[1]
    assert torch.equal(grown.labels, data.labels)
    found = [grown.images, model.bn.running_mean]
    others = [None, None]
    torch.distributed.all_gather_object(others, found)
    assert all(map(torch.equal, *others))
    torch.save(
        {"images": grown.images, "model": model.state_dict()},
        f"{folder}/grown-{torch.distributed.get_rank()}.pt",
    )


def short(folder, optimizer="sgd", model=GroupNormNet, images=None, **options):
    """A run of 3 epochs of 2 steps."""
    images = Images() if images is None else images
    options = {"epochs": 3, "batch_size": 20, "optimizer": optimizer, "keep_last": None, **options}
    return trainer(folder, model, images, images, method=entprop.EntProp(mix=None), **options)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def distributed(folder, accumulation=1):
    """The same batches per step whether two processes take one each, or one process accumulates two."""
    runs = {
        "vanilla": (Vanilla(), {}),
        "entprop": (entprop.EntProp(fraction=0.5, mix=None), {"ema_decay": 0.5}),
        "accumulated": (entprop.EntProp(fraction=0.5, mix=None, attack_steps=2), {"gradient_accumulation_steps": 2}),
    }
    for name, (method, options) in runs.items():
        options = {"gradient_accumulation_steps": 1, **options}
        options["gradient_accumulation_steps"] *= accumulation
        options |= {"batch_size": 4, "eval_batch_size": 5, "optimizer": "sgd", "learning_rate": 0.1, "log_every": 1}
        # 9 evaluation batches, the last of 3: an odd number for two processes, and uneven.
        run = trainer(f"{folder}/{name}", GroupNormNet, Images(32), Images(43), method=method, **options)
        run.fit()
        if name == "vanilla":
            run.evaluate(Images(3))  # fewer batches than processes


def together(rank, folder):
    """All that two processes do in the tests of test_processes.py."""
    os.environ["ACCELERATE_USE_CPU"] = "1"
    distributed(f"{folder}/two")
    for method in (entprop.EntProp(), entprop.EntProp(lagged=True)):
        resume_together(f"{folder}/two/{'lagged' if method.lagged else 'plain'}", method)
    grow_together(f"{folder}/grown")
    failing_alone(f"{folder}/failing", rank)
    differing(f"{folder}/differing", rank)


def failing_alone(folder, rank):
    """The second process alone fails while it evaluates or saves; both raise, and can continue together."""

    class Unsendable(Exception):
        """Of a class that no other process can import."""

    class Broken(Images):
        def __getitem__(self, index):
            if rank == 1 and index == 13:
                raise Unsendable("no such file")
            return super().__getitem__(index)

    def loss(logits, labels):
        if rank == 1 and run.position.step and not torch.is_grad_enabled():
            raise Unsendable("no such loss")
        return torch.nn.functional.cross_entropy(logits, labels)

    found = []

    def note(function, *args):
        try:
            function(*args)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")

    run = trainer(folder, data=Images(32), eval_data=Images(32), method=Vanilla(), loss=loss, epochs=1, batch_size=4)
    note(run.evaluate, Broken(32))
    note(run.fit)
    found.append(str(run.checkpoints.latest().name))
    run.loss = torch.nn.functional.cross_entropy
    found.append(f"{run.evaluate()['accuracy'] * 32:g} of 32")
    run = short(f"{folder}/full")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 if rank == 1 else before[0], before[1]))
    note(run.fit)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Path(folder, f"found-{rank}").write_text("\n".join(found))
    run.accelerator.wait_for_everyone()


def differing(folder, rank):
    """What is another on each process: data, a loss that is not finite, sizes that lagged steps have to drop."""
    found = []

    def note(make_run):
        try:
            make_run().fit()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")

    def run(name, data, model=GroupNormNet, **options):
        options = {"method": Vanilla(), "batch_size": 4, **options}
        return trainer(f"{folder}/{name}", model, data, Images(32), **options)

    note(lambda: run("share", DataLoader(Images(32), 4, sampler=range(16 * rank, 16 * rank + 16))))
    note(lambda: run("data", Images(32, seed=rank)))

    def loss(logits, labels):
        bad = rank == 1 and diverging.position.step == 2
        return torch.nn.functional.cross_entropy(logits, labels) / (0 if bad else 1)

    diverging = run("diverged", Images(32), loss=loss)
    note(lambda: diverging)
    assert all(parameter.isfinite().all() for parameter in diverging.model.parameters())

    def resized(samples):
        images, labels = default_collate(samples)
        return torch.nn.functional.interpolate(images, size=[8, 12][int(torch.randint(2, ()))]), labels

    method = entprop.EntProp(fraction=0.5, lagged=True)
    sizes = DataLoader(Images(32), 4, collate_fn=resized)
    for every in (1, 4):
        note(lambda every=every: run(f"sizes{every}", sizes, method=method, epochs=1, log_every=every))
    model = make(GroupNormNet)
    model.unused = torch.nn.Linear(1, 1)
    note(lambda: run("unused", Images(32), model=model))
    Path(folder, f"found-{rank}").write_text("\n".join(found))


def resume_together(folder, method):
    """Processes with dropout, MixUp and statistics of their own resume in the middle of an epoch, bit for bit."""
    ends = []
    for name, resume in (("whole", False), ("resumed", f"{folder}/whole/checkpoints/step-00000003")):
        options = {"batch_size": 8, "mixed_precision": "bf16", "ema_decay": 0.5, "save_every_steps": 1}
        images = Images(64, augment=True)
        run = trainer(f"{folder}/{name}", data=images, method=method, keep_last=None, **options)
        torch.rand(len(name))  # where random numbers stand must not matter
        run.fit(resume=resume)
        average = run._state.average.module.bn.running_var
        tensors = [*run.model.state_dict().values(), average, *lagged_state(run.model).values()]
        ends.append([(run.position, run.evaluate()), *tensors])
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1:], ends[1][1:]))
