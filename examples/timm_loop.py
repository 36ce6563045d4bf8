"""EntProp in a loop on timm's own data pipeline, optimizers and schedules.

    python examples/timm_loop.py path/to/images --model resnet18
    python examples/timm_loop.py --model test_resnet --image-size 32

The folder has class folders below train/ and validation/. Without one, digits are written into a temporary folder.
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import entprop_wrap as entprop

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", help="image folder; default: digits, written to a temporary one")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--image-size", type=int, help="pixels; default: the model's own")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--images", type=int, default=1797, help="number of digits to use")
options = parser.parse_args()

if options.folder is None:
    options.folder = tempfile.mkdtemp()
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images[: options.images], digits.target, strict=False)):
        folder = Path(options.folder, "validation" if index % 4 == 0 else "train", str(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).resize((40, 40)).convert("RGB").save(folder / f"{index}.png")

classes = len(list(Path(options.folder, "train").iterdir()))
model = timm.create_model(options.model, num_classes=classes)
config = resolve_model_data_config(model, {"img_size": options.image_size} if options.image_size else {})
loaders = {}
for split in ("train", "validation"):
    images = create_dataset("", root=options.folder, split=split)
    loaders[split] = create_loader(
        images,
        config["input_size"],
        batch_size=32,
        is_training=split == "train",
        **{key: config[key] for key in ("mean", "std", "interpolation", "crop_pct")},
        scale=(0.6, 1.0),
        hflip=0.0,
        re_prob=0.0,
        num_workers=0,
        use_prefetcher=False,  # images come normalised, on the CPU; leave timm's Mixup out: EntProp mixes
        persistent_workers=False,
    )

model = entprop.wrap(model)
print(entprop.summary(model))
groups = entprop.parameter_groups(model, weight_decay=0.05)
optimizer = create_optimizer_v2(groups, opt="adamw", lr=2e-3, weight_decay=0.0)
schedule = CosineLRScheduler(optimizer, t_initial=options.epochs, warmup_t=1, warmup_lr_init=1e-4)
space = entprop.PixelSpace.from_timm(config)

for epoch in range(options.epochs):
    schedule.step(epoch)
    model.train()
    for images, labels in loaders["train"]:
        out = entprop.training_step(model, images, labels, method=entprop.EntProp(fraction=0.25), pixel_space=space)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        right = [model(images).argmax(1) == labels for images, labels in loaders["validation"]]
    print(f"epoch {epoch + 1}: accuracy {torch.cat(right).float().mean():.1%}, {out.metrics()}")

model = entprop.unwrap(model)
