"""Answer with a server that speaks OpenAI's chat completions: vLLM, llama-server, `minivlm serve` and their like."""

import json
import os
from collections.abc import Iterator, Sequence
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from PIL import Image

from minivlm.data.pictures import to_data_url

TIMEOUT = 300  # seconds until a server has to say something
DONE = "[DONE]"  # the last event of a streamed answer


class Server:
    """Ask a server for greedy answers, one at a time, as its client.

    Args:
        url: where its interface begins, as http://127.0.0.1:8000/v1. The environment variable OPENAI_API_KEY is sent
            as its key, if it is set.

    Raises:
        ValueError: nothing answers there, or it serves no model.
    """

    def __init__(self, url: str):
        key = os.environ.get("OPENAI_API_KEY")
        self.url, self.headers = url.rstrip("/"), {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with urlopen(Request(f"{self.url}/models", headers=self.headers), timeout=TIMEOUT) as response:
                self.model = json.load(response)["data"][0]["id"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            message = f"{url}: no server with a model ({error}). Start it, and name http://HOST:PORT/v1."
            raise ValueError(message) from None

    def stream(self, messages: Sequence[dict], length: int) -> Iterator[str]:
        """Yield the pieces of an answer as they come.

        Args:
            messages: turns in OpenAI's form, as `with_urls` gives them.
            length: longest answer in tokens.

        Raises:
            ValueError: the server refuses the question, or is gone.
        """
        body = {"model": self.model, "messages": messages, "max_tokens": length, "temperature": 0, "stream": True}
        where, headers = f"{self.url}/chat/completions", self.headers | {"Content-Type": "application/json"}
        try:
            with urlopen(Request(where, json.dumps(body).encode(), headers), timeout=TIMEOUT) as response:
                for line in response:
                    event = line.decode().removeprefix("data:").strip()
                    if line.startswith(b"data:") and event != DONE:
                        yield from pieces(json.loads(event))
        except HTTPError as error:
            raise ValueError(f"{where} answers {error.code}: {error.read().decode()[:500]}") from None
        except OSError as error:
            raise ValueError(f"{where}: {error}. See what the server says.") from error


def pieces(event: dict) -> Iterator[str]:
    """Yield the text that an event of a stream brings."""
    for choice in event.get("choices", ()):
        if text := choice["delta"].get("content"):
            yield text


def with_urls(messages: Sequence[dict], pictures: Sequence[Image.Image]) -> list[dict]:
    """Return turns in OpenAI's form: each part of type `image` becomes the next of the pictures, as a PNG."""
    left = iter(pictures)
    return [
        turn | {"content": [as_url(next(left)) if part["type"] == "image" else part for part in turn["content"]]}
        for turn in messages
    ]


def as_url(picture: Image.Image) -> dict:
    """Return a picture as a part of a turn, without loss."""
    return {"type": "image_url", "image_url": {"url": to_data_url(picture)}}
