"""EntProp in a plain PyTorch loop: digits, mixed precision, clipping, a schedule; then unwrap and save.

    python examples/own_loop.py --epochs 20

Forward, loss and backward are one call; everything around it is as in any loop.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import entprop_wrap as entprop

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--output", default="digits.pt")
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = torch.float16 if device == "cuda" else torch.bfloat16

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # in [0, 1]
images = nn.functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
data = TensorDataset(images, torch.tensor(labels))
train, test = torch.utils.data.random_split(data, [1297, 500], torch.Generator().manual_seed(0))
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

model = nn.Sequential(
    *(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
).to(device)
model = entprop.wrap(model)  # before the optimizer
print(entprop.summary(model))

optimizer = torch.optim.AdamW(entprop.parameter_groups(model, weight_decay=0.05), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))
scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16)
method = entprop.EntProp(fraction=0.2)

for epoch in range(options.epochs):
    for batch, targets in loader:
        with torch.autocast(device, precision):
            out = entprop.training_step(
                model,
                batch.to(device),
                targets.to(device),
                method=method,
                backward=lambda loss: scaler.scale(loss).backward(),
            )
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
    print(f"epoch {epoch + 1}:", ", ".join(f"{name} {value:.3f}" for name, value in out.metrics().items()))

model = entprop.unwrap(model).eval()
with torch.inference_mode():
    right = [(model(x.to(device)).argmax(1).cpu() == y).float().mean() for x, y in DataLoader(test, 500)]
torch.save(model.state_dict(), options.output)  # plain keys, for the plain model
print(f"test accuracy {right[0]:.1%}; the plain weights are in {options.output}")
