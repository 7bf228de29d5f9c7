"""Publish a trained model on the Hugging Face Hub, where `from_pretrained` finds it.

    minivlm publish runs/train/final --repo_id jinv2/minivlm --tag v1.0
    minivlm publish runs/train/final --repo_id jinv2/minivlm --dry_run

Log in first: `hf auth login`, with a token that may write. A folder that could not be loaded is refused before
anything is sent. README.md, the model card, is written from run.json, recipe.yaml and loss.png of the run; a card of
your own is kept. After a failure repeat the command: what is already up is not sent again.
"""

from pathlib import Path

from minivlm.cli import Parser
from minivlm.hub.publish import MESSAGE, preview_upload, publish


def main(argv: list[str] | None = None) -> None:
    """Upload the model and print the URL of its commit, or with --dry_run print what would go up."""
    parser = Parser(__doc__, prog="minivlm publish")
    parser.add_argument("folder", type=Path, help="Folder of a finished model, as runs/train/final.")
    parser.add_argument("--repo_id", required=True, help="Where to: owner/name, as jinv2/minivlm. Made if need be.")
    parser.add_argument("--private", action="store_true", help="Make a new repository a private one.")
    parser.add_argument("--tag", help="Also give the commit this name, as v1.0, to be loaded by revision='v1.0'.")
    parser.add_argument("--message", default=MESSAGE, help=f"First line of the commit. Default: {MESSAGE}.")
    parser.add_argument("--dry_run", action="store_true", help="Write the card, list what would go up, send nothing.")
    args = parser.parse_args(argv)
    if args.dry_run:
        sizes = preview_upload(args.folder, args.repo_id, args.tag)
        print("".join(f"{size:>15,}  {file.as_posix()}\n" for file, size in sizes.items()), end="")
        print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files would go to {args.repo_id}")
    else:
        print(publish(args.folder, args.repo_id, private=args.private, tag=args.tag, message=args.message))
