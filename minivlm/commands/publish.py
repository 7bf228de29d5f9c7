"""Publish a trained model on the Hugging Face Hub, where `from_pretrained` finds it.

    minivlm publish runs/train/final --repo_id jinv2/minivlm --tag v1.0
    minivlm publish runs/train/final --repo_id jinv2/minivlm --dry_run
    minivlm publish runs/train --check

Log in first: `hf auth login`, with a token that may write. A folder that could not be loaded is refused before
anything is sent. README.md, the model card, is written from run.json, recipe.yaml and loss.png of the run; a card of
your own is kept. After a failure repeat the command: what is already up is not sent again.

--check sends nothing and changes nothing. It prints a line for each check, right or wrong, and ends with exit code 1
if one is wrong. It loads the model with the code in the folder from an empty cache, and measures it again. The limits
on sizes, the licence files and the record of metrics are rules for --repo_id jinv2/minivlm, and notes for others.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minivlm.cli import Parser, positive
from minivlm.hub.findings import Finding, inspect_files, load_by_stranger, stage
from minivlm.hub.publish import MESSAGE, preview_upload, publish
from minivlm.resources import HUB_MODEL


def parse_args(argv: list[str] | None):
    """Return the options of the command."""
    parser = Parser(__doc__, prog="minivlm publish")
    parser.add_argument("folder", type=Path, help="Folder of a finished model, or of the run that holds it in final/.")
    parser.add_argument("--repo_id", help="Where to: owner/name, as jinv2/minivlm. Made if need be.")
    parser.add_argument("--private", action="store_true", help="Make a new repository a private one.")
    parser.add_argument("--tag", help="Also give the commit this name, as v1.0, to be loaded by revision='v1.0'.")
    parser.add_argument("--message", default=MESSAGE, help=f"First line of the commit. Default: {MESSAGE}.")
    parser.add_argument("--dry_run", action="store_true", help="Write the card, list what would go up, send nothing.")
    parser.add_argument("--check", action="store_true", help="Check what would go up, send nothing.")
    parser.add_argument("--rows", type=positive, default=256, help="Rows that --check measures again. Default: 256.")
    args = parser.parse_args(argv)
    if not args.repo_id and not args.check:
        parser.error("--repo_id is missing: write owner/name, as jinv2/minivlm. --check works without it.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Upload the model and print the URL of its commit; with --dry_run or --check print what would go up, or how."""
    args = parse_args(argv)
    inside = args.folder / "final"
    is_run = not (args.folder / "config.json").is_file() and (inside / "config.json").is_file()
    folder = inside if is_run else args.folder
    if args.check:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json. Name the folder of a model, as runs/train/final.")
        findings = []
        for finding in check_all(folder, args.repo_id, args.rows):
            print(finding, flush=True)
            findings.append(finding)
        wrong = sum(finding.state == "wrong" for finding in findings)
        print(f"{wrong or 'none'} of {len(findings)} checks {'is' if wrong == 1 else 'are'} wrong: {folder}")
        if wrong:
            sys.exit(1)
    elif args.dry_run:
        sizes = preview_upload(folder, args.repo_id, args.tag)
        print("".join(f"{size:>15,}  {file.as_posix()}\n" for file, size in sizes.items()), end="")
        print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files would go to {args.repo_id}")
    else:
        print(publish(folder, args.repo_id, private=args.private, tag=args.tag, message=args.message))


def check_all(folder: Path, repo_id: str | None, rows: int) -> Iterator[Finding]:
    """Yield the findings of all checks on a copy of what would go up; the folder stays as it is."""
    from minivlm.evaluation.remeasure import remeasure

    ours = repo_id == HUB_MODEL
    with tempfile.TemporaryDirectory() as place:
        model = stage(folder, Path(place), repo_id)
        yield from inspect_files(model, ours)
        yield load_by_stranger(model)
    yield remeasure(folder, rows, ours)
