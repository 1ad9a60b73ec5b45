"""A module as a process that ends with the one that started it, also where that is killed:

    python -m nnunet_mim.system.child PARENT MODULE ARGUMENTS…

PARENT is the number of that process.
"""

import runpy
import sys

from nnunet_mim.system.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
