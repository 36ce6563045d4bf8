"""Train an image classifier with EntProp and without, and compare accuracy and robustness.

    accelerate launch examples/train.py                      # scikit-learn's digits, in a minute or two on a CPU
    accelerate launch examples/train.py --dataset path/to/images --model resnet50 --pretrained
    accelerate launch examples/train.py --help               # all options

The same as ``entprop-train`` and ``python -m entprop_wrap.cli``, which need no clone: the code is in
``entprop_wrap/cli``. A comparison of your own in Python is shorter: see finetune_trainer.py.
"""

from entprop_wrap.cli import main

if __name__ == "__main__":
    main()
