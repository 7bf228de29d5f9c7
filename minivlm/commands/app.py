"""Show a page in the browser that answers questions about pictures, in English and Chinese.

    minivlm app
    minivlm app runs/mine/final --port 8000
    minivlm app jinv2/minivlm --host 0.0.0.0

Without MODEL it takes this folder's model, that of the checkout, or the one on the Hub. The page needs gradio:
pip install minivlm[app]. With --host 0.0.0.0 other machines of the network can open the page, too.
"""

import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from minivlm.app.sentences import EXAMPLES
from minivlm.asking import load_assistant
from minivlm.cli import Parser, positive
from minivlm.resources import PACKAGE, default_model

TABLE = "data/concepts.json"  # the names that a model knows, if they lie beside it


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="minivlm app")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Folder or Hub id of a model.")
    # A Hugging Face Space sets these two variables.
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT")
    parser.add_argument("--host", default=host, help=f"Address that the page is served at. Default: {host}.")
    parser.add_argument(
        "--port", type=positive, default=port, metavar="N", help="Its port. Default: the first free one from 7860."
    )
    parser.add_argument(
        "--max_new_tokens", type=positive, default=128, metavar="N",
        help="Longest answer in tokens, until the user moves the slider. Default: 128.",
    )  # fmt: skip
    parser.add_argument("--device", help="Where to compute. Default: cuda if there is one, else cpu.")
    return parser.parse_mixed_args(argv)


def find_examples(model: str) -> Path | None:
    """Return the folder with the pictures of `EXAMPLES`: beside the model, in the checkout, or None."""
    from minivlm.app.names import beside

    paths = [beside(model, f"data/examples/{name}") for names, _ in EXAMPLES for name in names]
    if all(paths):
        return paths[0].parent
    folder = PACKAGE.parent / "data" / "examples"
    return folder if folder.is_dir() else None


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: gradio is not installed.
    """
    args = parse_args(argv)
    if find_spec("gradio") is None:  # before the model: it loads longer
        raise ValueError("minivlm app needs the package gradio. Install it: pip install minivlm[app]")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    title = f"MiniVLM · {Path(args.model).name}" if args.model else "MiniVLM"
    args.model = args.model or default_model()
    assistant = load_assistant(args)
    from minivlm.app.names import Namer, beside, read_names
    from minivlm.app.page import Page, serve

    namer = Namer(assistant, read_names(beside(args.model, TABLE)))
    page = Page(assistant, namer, title, find_examples(args.model), args.max_new_tokens)
    serve(page, args.host, args.port)
