"""Write the card's table of the model's formats from formats.json, the record of `minivlm benchmark-formats`."""

from pathlib import Path

from minivlm.hub.results import read_record

RECORD = "formats.json"
PACKAGES = ("torch", "transformers", "onnxruntime", "llama_cpp_python")


def formats_section(path: Path | None, weights: Path) -> str:
    """Return the card's section of formats; empty if `path`, the record, is None.

    Raises:
        ValueError: the record is one of other weights than those in the file `weights`.
    """
    if path is None:
        return ""
    record = read_record(path, weights, "minivlm benchmark-formats")
    return f"## Formats\n\n{formats_table(record)}\n\n{formats_notes(record)}"


def formats_table(record: dict) -> str:
    """Return the table of a record: a row for each format, with size, right answers, speed."""
    lines = ["| format | MB | right | as transformers | first token | tokens/s |", "|---|---|---|---|---|---|"]
    for row in record["formats"]:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        cells = [row["format"], size, "not run", "", "", ""]
        if right := row.get("right"):
            cells[2:4] = [f"{right['match']:.1%} ({counts(right)})", f"{row['same']} of {record['rows']}"]
            cells[4:] = [f"{1000 * row['first_token']:.0f} ms", f"{row['tokens_per_second']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def counts(cell: dict) -> str:
    """Return of how many answers a share is."""
    return f"{cell['hits']} of {cell['count']}"


def formats_notes(record: dict) -> str:
    """Return the lines below the table: what was measured, on which machine, and which formats are missing."""
    about = record["machine"]
    versions = [f"{name} {about[name]}" for name in PACKAGES if name in about]
    servers, threads = record.get("servers"), f"{about['threads']} threads"
    if about["threads"] == 1:
        threads = "one thread" if servers else "one thread, times are the processor's"
    notes = [
        f"Greedy answers to the first {record['rows']} rows of `{record['data']}`, one at a time. Right: an exact "
        "match, or the place for `point` and `box`; captions are left out. As transformers: the same answer, captions "
        "included. First token: the mean. Tokens/s: those after the first one of an answer.",
        f"Measured on {about['processor']}, {threads}; {', '.join(versions)}; commit {about['commit']}.",
    ]
    if servers:
        notes.append(f"Asked over HTTP, with threads of their own: {', '.join(servers)}.")
    notes += [f"No {name}: {reason}" for name, reason in record["refused"].items()]
    notes += [f"{row['format']} was not run: {row['why']}" for row in record["formats"] if row.get("why")]
    return "\n\n".join(notes)
