"""Name the error of a format that cannot hold a model, which `minivlm publish --formats` reports and passes over."""


class Inexpressible(ValueError):
    """The format cannot hold this model; the message names every reason and a remedy."""
