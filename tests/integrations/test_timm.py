"""timm's classifiers: pixel space, steps of a plain loop, and the Hugging Face Trainer through TimmWrapper."""

import pytest
import timm
import torch
import transformers
from torchvision.transforms.v2.functional import to_pil_image

import entprop_wrap as entprop
from entprop_wrap import EntProp, PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from tests.helpers.keys import is_auxiliary_key
from tests.integrations.hf_trainer_reference import RecordBatches, RecordGradients, assert_plain, make_trainer, worst

CLASSES, SIZE = 5, 64
METHOD = EntProp(fraction=0.5, mix=None)
MODELS = [name for name in ("test_resnet", "test_efficientnet", "test_vit", "test_convnext") if timm.is_model(name)]


def native(name):
    torch.manual_seed(3)
    size = {"img_size": SIZE} if "vit" in name else {}
    model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0, **size)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def wrapper(name):
    """The same model as transformers holds it, built from a configuration alone."""
    options = {"drop_path_rate": 0.0, **({"img_size": SIZE} if "vit" in name else {})}
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=CLASSES, model_args=options)
    model = transformers.TimmWrapperForImageClassification(config).train()
    model.timm_model.load_state_dict(native(name).state_dict())
    return model


def processor_of(name):
    return transformers.TimmWrapperImageProcessor(native(name).pretrained_cfg, architecture=name)


def samples(space, number=8):
    pixels = torch.rand(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (space.mean, space.std))
    return [{"pixel_values": (x - mean) / std, "labels": i % CLASSES} for i, x in enumerate(pixels)]


@pytest.mark.parametrize("name", MODELS)
def test_the_space_is_the_same_from_everywhere(name):
    model, processor = native(name), processor_of(name)
    space = PixelSpace.from_timm(model)
    assert PixelSpace.from_timm(model.pretrained_cfg) == space
    assert PixelSpace.from_timm(timm.get_pretrained_cfg(name)) == space
    assert PixelSpace.from_timm(timm.data.resolve_model_data_config(model)) == space
    assert PixelSpace.from_processor(processor) == space
    for value, bound in zip((0, 255), space.bounds(torch.zeros(1)), strict=True):
        image = torch.full((3, 80, 80), value, dtype=torch.uint8)
        pixels = processor(to_pil_image(image))["pixel_values"]
        torch.testing.assert_close(pixels, bound.expand_as(pixels), rtol=1e-4, atol=1e-4)


def test_a_space_is_not_guessed():
    with pytest.raises(ConfigurationError, match="PixelSpace"):
        PixelSpace.from_timm({"input_size": (3, 64, 64)})
    with pytest.raises(ConfigurationError, match="PixelSpace"):
        PixelSpace.from_timm(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_steps_a_wrapped_timm_model_as_a_plain_loop_does(name, tmp_path):
    processor = processor_of(name)
    space = PixelSpace.from_processor(processor)
    batches, gradients = RecordBatches(), RecordGradients()
    trainer = make_trainer(
        tmp_path,
        model=wrapper(name),
        data=samples(space),
        data_collator=batches,
        processing_class=processor,
        callbacks=[EntPropCallback(METHOD), gradients],
        max_steps=1,
        per_device_train_batch_size=8,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    model = entprop.wrap(native(name))
    batch = batches.batches[0]
    entprop.training_step(model, batch["pixel_values"], batch["labels"], method=METHOD, pixel_space=space)
    expected = {f"timm_model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any(map(is_auxiliary_key, expected))
    assert worst(gradients.steps, [expected]) < 5e-4

    trained = {name: value.clone() for name, value in entprop.main_state_dict(trainer.model.timm_model).items()}
    assert_plain(tmp_path / "checkpoint-1")
    loaded = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(value, trained[name]) for name, value in loaded.timm_model.state_dict().items())
    native(name).load_state_dict(trained)  # and it is timm's own model, with nothing left over
