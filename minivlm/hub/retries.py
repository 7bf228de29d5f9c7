"""Repeat a request to the Hub that failed for a temporary reason, and name a remedy for every failure."""

import json
import re
import sys
import time
from collections.abc import Callable

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from minivlm.hub.secrets import scrub, secret

TRANSIENT = (408, 409, 412, 429)  # and every 5xx. 409, 412: somebody else commits at this moment
WAITS = (1, 4, 16, 60)  # seconds before each further try
LONGEST_WAIT = 300  # seconds that a server may ask for; the Hub counts requests in windows of five minutes
TIMEOUT = 120.0  # seconds without a byte; huggingface_hub sets none, and training would wait for a dead connection


def retry(call: Callable):
    """Return what `call` returns; repeat it up to four times if it fails for a passing reason.

    huggingface_hub repeats file listing, preupload, LFS batch and PUT itself (`http_backoff`: six tries, Retry-After
    honoured whatever its length). It does not repeat the creation of repositories, card validation, commits and tags.
    """
    for wait in (*WAITS, None):
        session = get_session()
        if session.timeout.read is None:
            session.timeout = TIMEOUT
        try:
            return call()
        # A gateway's HTML in place of JSON is a JSONDecodeError: card validation reads the answer before its status.
        except (HTTPError, json.JSONDecodeError) as error:
            asked = seconds_asked(error)
            if wait is None or not is_passing(error) or asked > LONGEST_WAIT:
                raise
            print(scrub(f"{describe(error)}; trying again in {max(wait, asked)} s"), file=sys.stderr)
        time.sleep(max(wait, asked))


def is_passing(error: Exception) -> bool:
    """Return True if the request may succeed later and huggingface_hub has not repeated it itself."""
    status, (method, path) = status_of(error), request_of(error)
    if method == "PUT" or method == "GET" and "/tree/" in path or re.search(r"/preupload/|\.git/info/lfs/", path):
        return False  # huggingface_hub has tried six times already
    return status is None or status >= 500 or status in TRANSIENT


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of the answer; None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def request_of(error: Exception) -> tuple[str, str]:
    """Return method and path of the request, without the query, which may hold a signature."""
    try:  # not error.request where there is a response: huggingface_hub's errors lose theirs
        request = error.response.request if hasattr(error, "response") else error.request
        return request.method, request.url.path
    except (AttributeError, RuntimeError):  # RuntimeError: httpx's error without a request
        return "", ""


def seconds_asked(error: Exception) -> int:
    """Return the seconds that the server asks to wait, from Retry-After or the Hub's RateLimit header; 0 if none."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    after = headers.get("retry-after", "")
    window = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))  # no request left for t seconds
    return int(after) if after.isdigit() else int(window[1]) if window and status_of(error) == 429 else 0


def describe(error: Exception) -> str:
    """Return status, request and the server's words on one line."""
    request, status = " ".join(request_of(error)).strip(), status_of(error)
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    text = (getattr(error, "server_message", None) or "") if status else f"{kind}{error}"
    text = " ".join(text.split())[:300].rstrip(".")
    happened = f"{status} {error.response.reason_phrase}".strip() if status else ""
    return ": ".join(filter(None, [f"{happened} ({request})" if happened else request, text]))


def remedy(error: Exception, repo_id: str) -> str:
    """Return what the user can do about it; an empty text if that is not known."""
    status, owner = status_of(error), repo_id.split("/")[0]
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE."
    if status == 401:
        reason = "Its token was refused, which may have expired" if secret() else "There is no token on this machine"
        return f"{reason}: log in with `hf auth login` and a token that has write access."
    if status in (402, 403):
        return (
            f"Your token has not enough rights in {owner!r}: log in with `hf auth login` and one that has write "
            "access there, or choose a --repo_id in a namespace of your own."
        )
    if status == 404:
        return f"Check the spelling of {repo_id!r}, and that your token may see {owner!r}."
    if status == 413:
        return "A file is too large for the Hub: save smaller ones, by save_pretrained(folder, max_shard_size='5GB')."
    if status == 429:
        asked = seconds_asked(error)
        return f"Too many requests: wait {asked} s." if asked else "Too many requests: wait a few minutes."
    if status in TRANSIENT:
        return "Somebody else commits to this repository: wait until they are done."
    if isinstance(error, (HTTPError, json.JSONDecodeError)) and (status is None or status >= 500):
        return "The Hub does not answer as it should: look at your network, then at its status page."
    return ""
