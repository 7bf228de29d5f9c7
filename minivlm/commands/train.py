"""Train a model, as `accelerate launch train_accelerate.py` does.

minivlm train --recipe micro
minivlm train --model . --data my_pictures --epochs 3
"""

from train_accelerate import main

__all__ = ["main"]
