"""Remove the Hub's token from texts that are printed, logged or uploaded; find tokens and paths in files."""

import re
from pathlib import Path

from huggingface_hub import get_token

# Tokens of the Hub by their form, and whatever follows "Bearer": a server may repeat a request's header in its answer.
TOKENS = re.compile(r"\bhf_(oauth_|jwt_)?[A-Za-z0-9]{20,}[\w.-]*|(?<=Bearer )\S+")

# Keys and tokens of other services, by their form, and the heads of private keys.
KEYS = re.compile(
    rb"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{50,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|\bsk-[A-Za-z0-9_-]{32,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# Folders of somebody's machine. Not after a letter or a dot, as in an address on the web or in a relative path.
HOMES = re.compile(rb"(?<![\w.~*-])/(?:root|work|Users/\w+|home/\w+)/|\b[A-Z]:\\{1,2}Users\\{1,2}\w+")


def secret() -> str | None:
    """Return the token that this machine logs in with; None if there is none or it cannot be read."""
    try:
        return get_token()
    except Exception:  # this runs while another error is reported, which must not be replaced by a new one
        return None


def scrub(text: str) -> str:
    """Return `text` with `***` in the place of every token."""
    if token := secret():
        text = text.replace(token, "***")
    return TOKENS.sub("***", text)


def anonymous(text: str) -> str:
    """Return `text` without tokens and without the folders of absolute paths: everybody reads the card."""
    return re.sub(r"(?<![\w.~:/)-])/(?:[^\s/'\"`,\[\]{}<>]+/)+", "", scrub(text))


def leaks(content: bytes) -> list[str]:
    """Name what a file must not tell everybody: a token or key (its first characters), a folder of this machine."""
    found = [f"a token or key ({match[:6].decode()}...)" for match in set(KEYS.findall(content))]
    if (token := secret()) and token.encode() in content:
        found.append("the token of this machine")
    folders = {match.decode() for match in HOMES.findall(content)}
    for folder in {str(Path.home()), str(Path.cwd())}:
        if len(Path(folder).parts) > 2 and re.search(re.escape(folder.encode()) + rb"\b", content):
            folders.add(folder)
    return sorted(set(found)) + [f"the path {folder}" for folder in sorted(folders)]
