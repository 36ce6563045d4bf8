"""Fine-tune a model of the Hub with entprop.Trainer, then measure its robustness.

    python examples/finetune_trainer.py --dataset timm/oxford-iiit-pet --model google/mobilenet_v1_0.75_224
    accelerate launch examples/finetune_trainer.py ...         # on several GPUs

What is written: metrics, checkpoints to resume from, and the plain model with its image
processor.
"""

import argparse
import shlex

from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

import entprop_wrap as entprop
from entprop_wrap.finetuning import repair_keep_probabilities
from entprop_wrap.integrations.hub_datasets import eval_transform, load_images, train_transform
from entprop_wrap.robustness import evaluate_robustness

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", default="timm/oxford-iiit-pet", help="Hub id or local folder")
parser.add_argument("--model", default="google/mobilenet_v1_0.75_224", help="Hub id or local folder")
parser.add_argument("--image-size", type=int, default=96)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--max-train", type=int, help="maximum number of training images")
parser.add_argument("--max-eval", type=int, default=300, help="maximum number of evaluation images")
parser.add_argument("--output", default="finetuned")
options = parser.parse_args()

processor = AutoImageProcessor.from_pretrained(options.model)
space = entprop.PixelSpace.from_processor(processor)
data = load_images(
    options.dataset,
    train_transform=train_transform(options.image_size, normalize=space),
    eval_transform=eval_transform(options.image_size, normalize=space),
    max_train=options.max_train,
    max_eval=options.max_eval,
)
model = AutoModelForImageClassification.from_pretrained(
    options.model, id2label=data.id2label, label2id=data.label2id, ignore_mismatched_sizes=True
)
repair_keep_probabilities(model)  # MobileNetV1 needs it; other models stay as they are

trainer = entprop.Trainer(
    model,
    data.train,
    data.eval,
    method=entprop.EntProp.finetuning(),  # the preset for pretrained weights; EntProp() is the paper's
    pixel_space=space,
    config=entprop.TrainerConfig(
        epochs=options.epochs, batch_size=options.batch_size, learning_rate=1e-3, output_dir=options.output
    ),
)
trainer.fit()
print(trainer.evaluate())

model = entprop.unwrap(model).eval()
loader = DataLoader(data.eval, batch_size=options.batch_size)
result = evaluate_robustness(model, loader, pixel_space=space, severities=(1, 3, 5))
print(f"SA {result.sa:.1%}   RA {result.ra:.1%}   Hscore {result.hscore:.1%}   ({result.protocol})")

folder = f"{options.output}/model"  # where fit() has written the plain model
processor.save_pretrained(folder)  # how its images are normalised; their size stays the processor's own
print(
    f"The plain model is in {folder}: AutoModelForImageClassification.from_pretrained loads it. To evaluate it again:"
)
again = [folder, "--dataset", options.dataset, "--image-size", str(options.image_size)]
print(shlex.join(["python", "examples/evaluate_checkpoint.py", *again]))
