"""Fine-tune a model of the Hub with the Hugging Face Trainer and EntProp, then measure its robustness.

    python examples/finetune_hf_trainer.py --dataset timm/oxford-iiit-pet --model google/mobilenet_v1_0.75_224

One line is EntProp's: the callback. Images are normalised as the processor says, which also tells the callback.
"""

import argparse
import shlex

import numpy as np
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

import entprop_wrap as entprop
from entprop_wrap.finetuning import repair_keep_probabilities
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from entprop_wrap.integrations.hub_datasets import eval_transform, hf_collate, load_images, train_transform
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
space = entprop.PixelSpace.from_processor(processor)  # how the model wants its images normalised
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

trainer = Trainer(
    model,
    TrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data.train,
    eval_dataset=data.eval,
    data_collator=hf_collate,
    processing_class=processor,
    compute_metrics=lambda prediction: {"accuracy": np.mean(prediction.predictions.argmax(-1) == prediction.label_ids)},
    callbacks=[EntPropCallback(entprop.EntProp.finetuning())],  # the one line; the preset is for pretrained weights
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()  # the plain model and its processor, and the auxiliary copies in a file beside it

model = entprop.unwrap(model).eval()
loader = DataLoader(data.eval, batch_size=options.batch_size, collate_fn=hf_collate)
result = evaluate_robustness(model, loader, pixel_space=space, severities=(1, 3, 5))
print(f"SA {result.sa:.1%}   RA {result.ra:.1%}   Hscore {result.hscore:.1%}   ({result.protocol})")

print(f"The plain model is in {options.output}. To measure it:")
again = [options.output, "--dataset", options.dataset, "--image-size", str(options.image_size)]
print(shlex.join(["python", "examples/evaluate_checkpoint.py", *again]))
