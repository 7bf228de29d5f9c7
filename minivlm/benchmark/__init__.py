"""Measure how fast the model trains and answers, beside its peers and the machine's floor."""
