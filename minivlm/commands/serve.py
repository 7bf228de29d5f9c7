"""Serve a model to programs, in the format of OpenAI's chat completions.

    minivlm serve
    minivlm serve runs/mine/final --port 8001
    minivlm serve jinv2/minivlm --host 0.0.0.0 --api_key_file key.txt
    minivlm serve --allow_url upload.wikimedia.org

Without MODEL it takes this folder's model, that of the checkout, or the one on the Hub. The server is that of
transformers; a guard in front of it checks each request. It needs a few packages: pip install minivlm[serve].

Clients send pictures in data: URLs; pictures of other hosts are fetched only with --allow_url. The key of
--api_key_file, or of the variable MINIVLM_API_KEY, must come with each request except /health.
"""

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from minivlm.asking import load_assistant
from minivlm.cli import Parser, positive
from minivlm.resources import default_model
from minivlm.server.limits import Limits

PACKAGES = ("fastapi", "openai", "uvicorn")


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="minivlm serve")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Folder or Hub id of a model.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen at. Default: 127.0.0.1, this machine.")
    parser.add_argument("--port", type=positive, default=8000, metavar="N", help="Its port. Default: 8000.")
    parser.add_argument("--name", help="Name of the model in requests. Default: that of its folder.")
    parser.add_argument("--api_key_file", metavar="FILE", help="File with the key that clients must send.")
    parser.add_argument(
        "--allow_url", action="append", default=[], metavar="HOST",
        help="Fetch pictures of this host. Can be repeated. Default: none.",
    )  # fmt: skip
    limits = Limits()
    for option, default, text in (
        ("max_new_tokens", limits.new_tokens, "Longest answer in tokens; a request may ask for less."),
        ("max_pictures", limits.pictures, "Most pictures in a request."),
        ("max_waiting", limits.waiting, "Most requests that wait; more get status 503."),
    ):
        parser.add_argument(
            f"--{option}", type=positive, default=default, metavar="N", help=f"{text} Default: {default}."
        )
    parser.add_argument("--device", help="Where to compute. Default: cuda if there is one, else cpu.")
    return parser.parse_mixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C.

    Raises:
        ValueError: a package is missing, the key is, or the port is taken.
    """
    args = parse_args(argv)
    if missing := [name for name in PACKAGES if find_spec(name) is None]:  # before the model: it loads longer
        names = ", ".join(missing)
        raise ValueError(f"minivlm serve needs the packages {names}. Install them: pip install minivlm[serve]")
    from minivlm.server import launch

    key = launch.read_key(args.api_key_file, args.host)
    sock = launch.listen(args.host, args.port)
    found = args.model or default_model()
    name = args.name or (Path(found).resolve().name if Path(found).is_dir() else found)
    args.model = found
    limits = Limits(new_tokens=args.max_new_tokens, pictures=args.max_pictures, waiting=args.max_waiting)
    app = launch.build(load_assistant(args), name, limits, args.allow_url, key)
    launch.serve(app, sock, args)
