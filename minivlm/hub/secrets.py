"""Remove the Hub's token from texts that are printed, logged or uploaded."""

import re

from huggingface_hub import get_token

# Tokens of the Hub by their form, and whatever follows "Bearer": a server may repeat a request's header in its answer.
TOKENS = re.compile(r"\bhf_(oauth_|jwt_)?[A-Za-z0-9]{20,}[\w.-]*|(?<=Bearer )\S+")


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
