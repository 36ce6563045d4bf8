"""Measure the accuracy and robustness of a saved model: SA, RA, Hscore, and a table of the corruptions.

    python examples/evaluate_checkpoint.py runs/model --dataset timm/oxford-iiit-pet --report robustness

The model is a Hub id, or a folder that save_pretrained, a Trainer or entprop.Trainer has written. Images are normalised
as the image processor in it says; where it holds none, --processor names the model it was fine-tuned from.
"""

import argparse
import json
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

import entprop_wrap as entprop
from entprop_wrap.integrations.hub_datasets import eval_transform, load_images
from entprop_wrap.reporting import report
from entprop_wrap.robustness import evaluate_robustness

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Hub id or local folder")
parser.add_argument("--dataset", required=True, help="Hub id or local folder")
parser.add_argument("--processor", help="Hub id or folder of the image processor; default: the model's")
parser.add_argument("--image-size", type=int, help="pixels, as in training; default: the processor's")
parser.add_argument("--max-eval", type=int, help="maximum number of evaluation images")
parser.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5])
parser.add_argument("--report", type=Path, help="write <report>.json, <report>.md and <report>.html")
options = parser.parse_args()

model = AutoModelForImageClassification.from_pretrained(options.model).eval()
try:
    processor = AutoImageProcessor.from_pretrained(options.processor or options.model)
except (OSError, ValueError) as error:  # entprop.Trainer writes none
    parser.error(
        f"Expected an image processor with the model, found none in {options.processor or options.model!r}: pass "
        f"--processor with the model it was fine-tuned from. ({str(error).splitlines()[0]})"
    )
space = entprop.PixelSpace.from_processor(processor)
if options.image_size:
    transform = eval_transform(options.image_size, normalize=space)
else:
    transform = lambda image: processor(image, return_tensors="pt")["pixel_values"][0]  # noqa: E731
classes = [model.config.id2label[index] for index in range(model.config.num_labels)]  # labels in the model's order
data = load_images(options.dataset, classes=classes, eval_transform=transform, max_eval=options.max_eval)

loader = DataLoader(data.eval, batch_size=64)
result = evaluate_robustness(model, loader, pixel_space=space, severities=options.severities)
print(result.to_markdown())
print(f"\nSA {result.sa:.1%}   RA {result.ra:.1%}   Hscore {result.hscore:.1%}   ({result.protocol})")

if options.report:
    options.report.with_suffix(".json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    options.report.with_suffix(".md").write_text(result.to_markdown() + "\n")
    report(result, options.report.with_suffix(".html"), title=f"Robustness of {options.model}")
