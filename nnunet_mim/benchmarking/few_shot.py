"""The few-shot protocol: what pretraining is worth with few and with all labels.

python -m nnunet_mim.benchmarking.few_shot -d 501 -p nnUNetMiMPlans --labels 5 10 20 all --seeds 3 --fold 0
"""

from __future__ import annotations

import sys

from nnunet_mim.benchmarking.few_shot_cli import main

if __name__ == "__main__":
    sys.exit(main())
