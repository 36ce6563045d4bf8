"""EntProp, or any other method of this library, in Lightning.

trainer = L.Trainer(callbacks=[EntPropLightningCallback(EntProp(fraction=0.2), pixel_space=space)])
trainer.fit(module, loader)
"""

from entprop_wrap.integrations.lightning.callback import EntPropLightningCallback

__all__ = ["EntPropLightningCallback"]
