"""Conversions from and to other formats: `python -m scripts.convert --help`."""
