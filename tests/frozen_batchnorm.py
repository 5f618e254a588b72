"""Run a script, argv[1], whose BatchNorm always uses its running statistics and never changes them.

Then a batch in two halves gives the gradient of the whole, and two ranks have to do what one does.
"""

import runpy
import sys
from pathlib import Path

from torch import nn

nn.BatchNorm2d.train = lambda module, mode=True: nn.Module.train(module, False)
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
