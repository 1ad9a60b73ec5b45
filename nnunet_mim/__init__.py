"""MiM (Mask in Mask) self-supervised pretraining for nnU-Net.

This file holds the version and imports nothing: Python runs it at every start-up (see `_register.py`).
"""

__version__ = "0.1.0"
