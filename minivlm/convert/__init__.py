"""Convert models from and to other formats; `minivlm convert --help` lists the conversions."""
