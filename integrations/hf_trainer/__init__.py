"""EntProp, or any other method of this library, in the Hugging Face Trainer.

    trainer = Trainer(..., processing_class=processor, callbacks=[EntPropCallback(EntProp(fraction=0.2))])
    trainer.train()

Everything else stays the Trainer's: loss, accumulation, clipping, mixed precision, processes, schedule, evaluation.
Checkpoints hold the plain model; the auxiliary copies are in ``entprop_auxiliary.safetensors`` beside it.
"""

from entprop_wrap.integrations.hf_trainer.callback import EntPropCallback
from entprop_wrap.integrations.hf_trainer.checkpoints import last_complete_checkpoint

__all__ = ["EntPropCallback", "last_complete_checkpoint"]
