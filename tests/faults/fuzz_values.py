"""Arguments that nobody should pass, by name: each call makes a new one, as generators run out and models change."""

import math
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.methods import Vanilla

_EXPRESSIONS = """
None True False 0 1 -1 2 3 0.5 -0.5 1.5 1e300 1e-300 10**30 -10**30 10**400 float('nan') float('inf') -float('inf') 1+2j
Fraction(1,2) Fraction(10**400) Decimal('0.5') Decimal('nan')
'' '55' 'aux' 'nonsense' '\\x00' 'fog' 'sample' 'a|b' 'x'*2000 b'' b'55' bytearray(b'a')
np.int8(2) np.int64(2) np.uint8(255) np.float16(0.5) np.float32(0.5) np.float64('nan') np.longdouble(0.5) np.bool_(True)
np.str_('aux') np.bytes_(b'a') np.complex64(1) np.datetime64('2024-01-01') np.void(b'ab')
np.array(2) np.array(0.5) np.array('aux') np.array(None) np.array([0.5,0.5]) np.array([0.5,0.25,0.5]) np.zeros((2,3))
np.array([]) np.array(['a','b']) np.zeros((4,3,32,32),np.float32) np.zeros((4,3,32,32),np.uint8) np.arange(4)
torch.tensor(0.5) torch.tensor(2) torch.tensor(float('nan')) torch.tensor(True) torch.ones(3) torch.zeros(0)
torch.arange(4) torch.arange(5) torch.arange(4)-9 torch.rand(4,5) torch.rand(5) torch.zeros(4,dtype=torch.bool)
torch.rand(4,3,32,32).half() torch.rand(4,3,32,32).long() torch.rand(4,3,32,32)*255 torch.rand(4,1,32,32)
torch.rand(3,3,32,32) torch.rand(0,3,32,32) torch.rand(4,3,8,8) torch.rand(4,32,32,3) torch.full((4,3,32,32),math.nan)
torch.rand(4,3,32,32,device='meta') torch.arange(4,device='meta') torch.rand(4,3,32,32).to_sparse()
torch.rand(4,3,32,32,dtype=torch.complex64)
[] () {} set() frozenset() [None] [[]] [0] [1,2] (1,1) [0.5,0.5,0.5] [float('nan')] [True] ['a','a'] ['aux'] ['','aux']
[b'a'] ['x',1] range(3) range(0) slice(3) [10**400] {'a':1} {1:'a'} {'a':float('nan')} {'a':[]} {None:None} {(1,2):3}
{'a':{}} {'':1} {'a':{0.5:2}} {'model':'x'} OrderedDict(a=1) [torch.ones(3)] {'a':torch.rand(2,2)}
((x)for(x)in()) ((x)for(x)in(1,2)) iter([]) iter('ab') iter([None]) map(str,'ab') zip() [(1,2)] [([],[])]
[(torch.rand(4,3,32,32),torch.arange(9))] [(torch.rand(4,3,32,32),None)] [torch.rand(4,3,32,32)] [{'images':1}]
[{'image':torch.rand(4,3,32,32)}] [(torch.rand(4,3,32,32),['a']*4)] [(np.zeros((4,3,32,32)),np.arange(4))]
Returns(None) Returns('') Returns(torch.tensor(float('nan'))) Returns(torch.ones(2)) Returns(np.float64(1)) Returns(1)
int str float type object object() Exception ValueError('x') math ... NotImplemented Path('x') Path('') Path('/')
nn.Linear nn.Identity nn.BatchNorm2d nn.Identity() nn.BatchNorm2d(4) nn.Sequential() nn.ModuleList()
nn.Parameter(torch.ones(2)) nn.Sequential(nn.BatchNorm2d(3),nn.Flatten()) torch.device('cpu')
torch.float32 torch.Generator() entprop entprop.EntProp entprop.EntProp() entprop.PixelSpace entprop.PixelSpace()
entprop.PixelSpace((0.5,0.5),(0.2,0.2)) entprop.MixUp entprop.MixUp()
Vanilla() entprop.TrainerConfig entprop.TrainerConfig()
"""


class Returns:
    """A function of anything, which returns one thing."""

    def __init__(self, value):
        self.value = value

    def __call__(self, *args, **kwargs):
        return self.value

    def __repr__(self):
        return f"Returns({self.value!r})"


_NAMES = {
    "Decimal": Decimal,
    "Fraction": Fraction,
    "OrderedDict": OrderedDict,
    "Path": Path,
    "Returns": Returns,
    "Vanilla": Vanilla,
    "entprop": entprop,
    "math": math,
    "nn": nn,
    "np": np,
    "torch": torch,
}


def make(expression):
    """Return a new value from an entry of :data:`VALUES`."""
    return eval(expression, dict(_NAMES))


VALUES = tuple(_EXPRESSIONS.split())
