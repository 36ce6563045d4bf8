"""Image classification data for training and evaluation, from the Hugging Face Hub, a folder or memory.

data = load_images("timm/oxford-iiit-pet", train_transform=train_transform(224), eval_transform=eval_transform(224))
loader = DataLoader(data.train, batch_size=64, shuffle=True, num_workers=4)
model = AutoModelForImageClassification.from_pretrained(name, id2label=data.id2label, label2id=data.label2id)
"""

from entprop_wrap.integrations.hub_datasets.images import (
    BrokenImageError,
    InMemoryImages,
    LabelledImages,
    hf_collate,
    in_memory,
    to_rgb,
)
from entprop_wrap.integrations.hub_datasets.loading import ImageData, load_images
from entprop_wrap.integrations.hub_datasets.transforms import eval_transform, train_transform

__all__ = [
    "BrokenImageError",
    "ImageData",
    "InMemoryImages",
    "LabelledImages",
    "eval_transform",
    "hf_collate",
    "in_memory",
    "load_images",
    "to_rgb",
    "train_transform",
]
