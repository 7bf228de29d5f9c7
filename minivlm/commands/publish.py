"""Publish a trained model on the Hugging Face Hub, where `from_pretrained` finds it.

    minivlm publish runs/train/final --repo_id jinv2/minivlm --tag v1.0
    minivlm publish runs/train/final --repo_id jinv2/minivlm --formats --dry_run
    minivlm publish runs/train --check

Log in first: `hf auth login`, with a token that may write. A folder that could not be loaded is refused before
anything is sent. README.md, the model card, is written from run.json, recipe.yaml and loss.png of the run; a card of
your own is kept. After a failure repeat the command: what is already up is not sent again.

--formats also makes the model's ONNX graphs and GGUF files, and puts them into repositories of their own, as
jinv2/minivlm-ONNX, -ONNX-int8 and -GGUF. The Hub lists them on the model's page as quantizations. All of them are
made and checked before anything is sent. A format that cannot hold the model is named with the reason, and left out.

--check sends nothing and changes nothing. It prints a line for each check, right or wrong, and ends with exit code 1
if one is wrong. It loads the model with the code in the folder from an empty cache, and measures it again. The limits
on sizes, the licence files and the record of metrics are rules for --repo_id jinv2/minivlm, and notes for others.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minivlm.cli import Parser, positive
from minivlm.hub.children import Child, prepare_child, publish_child
from minivlm.hub.findings import Finding, inspect_files, load_by_stranger, stage
from minivlm.hub.publish import MESSAGE, Release, preview_upload, publish, sizes_of
from minivlm.resources import HUB_MODEL


def parse_args(argv: list[str] | None):
    """Return the options of the command."""
    parser = Parser(__doc__, prog="minivlm publish")
    parser.add_argument("folder", type=Path, help="Folder of a finished model, or of the run that holds it in final/.")
    parser.add_argument("--repo_id", help="Where to: owner/name, as jinv2/minivlm. Made if need be.")
    parser.add_argument("--private", action="store_true", help="Make a new repository a private one.")
    parser.add_argument("--tag", help="Also give the commit this name, as v1.0, to be loaded by revision='v1.0'.")
    parser.add_argument("--formats", action="store_true", help="Also publish ONNX graphs and GGUF files, beside it.")
    parser.add_argument("--message", default=MESSAGE, help=f"First line of the commit. Default: {MESSAGE}.")
    parser.add_argument("--dry_run", action="store_true", help="Write the card, list what would go up, send nothing.")
    parser.add_argument("--check", action="store_true", help="Check what would go up, send nothing.")
    parser.add_argument("--rows", type=positive, default=256, help="Rows that --check measures again. Default: 256.")
    args = parser.parse_args(argv)
    if not args.repo_id and not args.check:
        parser.error("--repo_id is missing: write owner/name, as jinv2/minivlm. --check works without it.")
    if args.check and args.formats:
        parser.error("--check and --formats exclude each other. --dry_run --formats makes and checks the formats.")
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
    else:
        options = {name: getattr(args, name) for name in ("private", "tag", "message", "formats")}
        send(Release(folder, args.repo_id, **options), args.dry_run)


def send(release: Release, dry_run: bool) -> None:
    """Upload the model, then its formats, and print the URL of each commit; or list the files and send nothing."""
    sizes = preview_upload(release.folder, release.repo_id, release.tag)
    with tempfile.TemporaryDirectory() as place:
        children = make_children(release, Path(place)) if release.formats else []
        if dry_run:
            show(release.repo_id, sizes)
            for child in children:
                show(child.repo_id, sizes_of(child.folder))
            return
        options = {name: value for name, value in vars(release).items() if name not in ("folder", "repo_id")}
        print(publish(release.folder, release.repo_id, **options), flush=True)
        for child in children:
            print(publish_child(child, release), flush=True)


def make_children(release: Release, place: Path) -> list[Child]:
    """Make each format in `place`, and check it; print a line for each that cannot hold the model.

    Raises:
        ValueError: a format could not be made, or is not ready for the Hub.
    """
    from minivlm.convert.formats import make_formats  # it imports torch

    made, refused = make_formats(release.folder, place)
    for name, reason in refused.items():
        print(f"no {name}: {reason}", flush=True)
    return [prepare_child(name, folder, release) for name, folder in made.items()]


def show(repo_id: str, sizes: dict[Path, int]) -> None:
    """Print the files that would go to a repository, and their sizes."""
    print("".join(f"{size:>15,}  {file.as_posix()}\n" for file, size in sizes.items()), end="")
    print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files would go to {repo_id}")


def check_all(folder: Path, repo_id: str | None, rows: int) -> Iterator[Finding]:
    """Yield the findings of all checks on a copy of what would go up; the folder stays as it is."""
    from minivlm.evaluation.remeasure import remeasure

    ours = repo_id == HUB_MODEL
    with tempfile.TemporaryDirectory() as place:
        model = stage(folder, Path(place), repo_id)
        yield from inspect_files(model, ours)
        yield load_by_stranger(model)
    yield remeasure(folder, rows, ours)
