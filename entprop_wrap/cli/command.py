"""``main``: read the command line, then import what is needed to train."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from entprop_wrap.cli.options import parse
from entprop_wrap.errors import EntPropError

DESCRIPTION = """Train an image classifier with EntProp and without, from the same seed, and compare them.

    {command}
    {command} --dataset path/to/images --model resnet50 --pretrained --methods vanilla entprop_finetuning
    {command} --methods vanilla entprop advprop fast_advprop --equal-cost
    {command} --dataset timm/oxford-iiit-pet --model microsoft/resnet-50 --pretrained
    {command} --methods entprop advprop --set epsilon=8/255 uncertainty=logit_margin targeted=true --attack 8/255
    {command} --methods entropic_retraining --weights outputs/train/vanilla-seed0/model

The first trains on scikit-learn's digits, in a minute or two on a CPU. Every method is trained once per seed, on the
same data in the same order. The tables at the end give clean accuracy (SA), mean accuracy under corruptions (RA), their
harmonic mean (Hscore), accuracy under PGD-20 with --attack, and differences to the first method; below them are the
seconds that training took, and passes per step, where one pass is forward and backward of one batch. The output folder
then holds results.json, report.html, and one folder per run with its checkpoints, its metrics.jsonl and the final
model, which loads without entprop_wrap. --weights starts from such a model: entropic_retraining needs that, few epochs,
and a small learning rate.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and compare. Errors of the package end as one line, and Ctrl-C too.

    Args:
        arguments: The command line; None: that of the process.
    """
    command = "accelerate launch examples/train.py" if sys.argv[0].endswith("examples/train.py") else "entprop-train"
    options = parse(DESCRIPTION.format(command=command), arguments)
    try:
        from entprop_wrap.cli.run import run

        run(options)
    except KeyboardInterrupt:
        given = [one for one in (sys.argv[1:] if arguments is None else arguments) if one != "--resume"]
        print(f"\nInterrupted. To continue: {shlex.join([*command.split(), *given, '--resume'])}", file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}. The command needs more: pip install 'entprop-wrap[examples]'.") from error
    except EntPropError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
