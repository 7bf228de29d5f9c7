"""Measure what each part of the recipe is worth: one change at a time, three seeds, one table."""
