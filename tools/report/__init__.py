"""Report what a model can do: measurements, tables, plots and pictures of answers for a release."""
