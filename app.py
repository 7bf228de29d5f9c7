"""Run `minivlm app` with the model of this folder, or the one on the Hub: a Hugging Face Space starts this file."""

import sys

from minivlm.cli import run_command
from minivlm.commands.app import main

if __name__ == "__main__":
    sys.exit(run_command(main))
