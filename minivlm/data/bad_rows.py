"""Name what is wrong with a row, and count rows by it."""

from collections import Counter

CUT = "cut at a turn"  # kind of note on a row that was shortened
LOW_RATING = "below min_rating"  # kind of a row whose turns are all rated too low
BY_CHOICE = (CUT, LOW_RATING)  # kinds that are counted, but are no fault of the data


class BadRow(ValueError):
    """A row that cannot be trained on: the trainer counts and skips it, up to the share `--max_bad_rows`.

    The message up to its first colon is the kind under which such rows are counted.
    """


def kind_of(reason: BadRow | str) -> str:
    """Return the kind of a bad row: its reason up to the first colon."""
    return str(reason).split(":")[0]


def describe_bad_rows(bad_rows: Counter) -> str:
    """Return one line per kind of bad row, with its count."""
    return "\n".join(f"  {count} x {kind}" for kind, count in bad_rows.most_common())
