"""A Trainer of a small net on small data."""

from entprop_wrap import Trainer, TrainerConfig
from tests.helpers.trainer_toys import BatchNormNet, Images, make


def trainer(folder, model=BatchNormNet, data=None, eval_data=None, *, method=None, loss=None, ready=None, **options):
    """Return a Trainer of a net, or of a class of nets, with these options; ``ready`` is an optimizer."""
    options = {"epochs": 2, "batch_size": 10, "progress": False, **options}
    model = make(model) if isinstance(model, type) else model
    data, eval_data = Images() if data is None else data, Images(seed=1) if eval_data is None else eval_data
    config = TrainerConfig(output_dir=folder, **options)
    return Trainer(model, data, eval_data, method=method, loss=loss, config=config, optimizer=ready)
