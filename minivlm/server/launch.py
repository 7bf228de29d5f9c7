"""Start transformers' server with our model in it and the guard in front of it."""

import json
import os
import signal
import socket
from argparse import Namespace
from pathlib import Path

import torch
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from minivlm.inference import Assistant, Decoding
from minivlm.server.bodies import Bodies
from minivlm.server.guard import Guard
from minivlm.server.limits import LOOPBACK, Limits

KEY = "MINIVLM_API_KEY"  # environment variable
SHORTEST_KEY = 16  # characters
GRACE = 30  # seconds that answers have to end after SIGTERM or Ctrl-C


def read_key(path: str | None, host: str) -> str | None:
    """Return the key that clients must send: of a file, else of the environment, which then forgets it.

    Raises:
        ValueError: it is too short or has blanks, or there is none and other machines could ask.
    """
    given = os.environ.pop(KEY, None)
    key, source = (given, KEY) if path is None else (Path(path).read_text(encoding="utf-8"), path)
    if key is None:
        if host not in LOOPBACK:
            raise ValueError(
                f"--host {host}: other machines can reach the server, and it has no key. Give --api_key_file FILE or "
                f"set {KEY}, or leave --host out."
            )
        return None
    key = key.strip()
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{source}: the key must have at least {SHORTEST_KEY} ASCII characters and no blanks. Make one: "
            "openssl rand -hex 32"
        )
    return key


def tokens_fit(assistant: Assistant):
    """Return a function that raises ValueError if the model cannot read messages and an answer of so many tokens."""

    def fits(messages: list[dict], new_tokens: int) -> None:
        plain = [
            m | {"content": [p if p["type"] == "text" else {"type": "image"} for p in m["content"]]} for m in messages
        ]
        assistant.check_room(len(assistant.tokens(plain)), new_tokens, "max_tokens")

    return fits


def shrinking(assistant: Assistant):
    """Return a function that resizes a picture as the processor does; None if it would change the pixel values.

    transformers would decode pictures in full size between two tokens of a stream, while nothing else is answered.
    """
    pixels, process = assistant.encoder.pixels, assistant.encoder.processor.image_processor
    trial = Image.effect_noise((2 * pixels.size[0] + 1, pixels.size[1] // 2 + 3), 100).convert("RGB")

    def shrink(image: Image.Image) -> Image.Image:
        return image.resize(pixels.size, pixels.resample)

    once, twice = (process([image], return_tensors="pt")["pixel_values"] for image in (trial, shrink(trial)))
    return shrink if torch.equal(once, twice) else None


def generation_config(assistant: Assistant, name: str, decoding: dict) -> str:
    """Return the generation config of a request as JSON: the model's own, decoded as `Decoding` says.

    transformers would keep the model's `do_sample`, so that a temperature does nothing to a greedy model.
    """
    values = assistant.model.generation_config.to_dict()
    seed = decoding.pop("seed", None)
    values |= Decoding(**decoding).arguments() | {"minivlm_request": name, "minivlm_seed": seed}
    values["minivlm_grammar"] = decoding.get("grammar")
    return json.dumps(values)


def make_stoppable(assistant: Assistant, left: set[str]) -> None:
    """Let `generate` end at the next token once the name of its request is in `left`; draw from the request's seed,
    and follow its grammar."""
    generate = assistant.model.generate

    def stoppable(**inputs):
        config = inputs["generation_config"]
        name, seed, grammar = (config.__dict__.pop(f"minivlm_{key}") for key in ("request", "seed", "grammar"))
        if seed is not None:  # here, where answers are computed one after another
            torch.manual_seed(seed)

        def is_left(input_ids, scores, **kwargs) -> torch.Tensor:
            return torch.full((len(input_ids),), name in left, device=input_ids.device)

        followed = {} if grammar is None else {"logits_processor": [assistant.follow(grammar)]}
        return generate(**inputs, **followed, stopping_criteria=[is_left])

    assistant.model.generate = stoppable


def transformers_app(assistant: Assistant, name: str):
    """Return the app of `transformers serve`, with the model of the assistant loaded under a name.

    `transformers serve` itself looks a class up in transformers, so it cannot load a model whose code is elsewhere, or
    asks for the code beside the weights. Here the installed code has loaded it.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import TimedModel

    class Built(Serve):
        """Build the app, and leave it to the caller to serve it."""

        def start_server(self):
            pass

    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("minivlm", type(assistant.model).__name__)
    built = Built(device=str(assistant.model.device), log_level="error", non_blocking=True)
    manager = built._model_manager
    manager.force_model, manager.model_timeout = name, -1  # no other model is loaded, and this one stays
    model = TimedModel(assistant.model, -1, assistant.encoder.processor)
    manager.loaded_models[manager.process_model_name(name)] = model
    return built.server.config.app


def build(assistant: Assistant, name: str, limits: Limits, hosts: list[str], key: str | None) -> Guard:
    """Return the app that answers requests."""
    control = assistant.tokenizer.get_added_vocab()
    shrink = shrinking(assistant) or (lambda image: image)
    bodies = Bodies(name, limits, control, hosts, tokens_fit(assistant), shrink)

    def prepare(request: str, decoding: dict) -> str:
        return generation_config(assistant, request, decoding)

    guard = Guard(transformers_app(assistant, name), bodies, key, prepare)
    make_stoppable(assistant, guard.left)
    return guard


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; an error names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}. Choose another port.") from error


def serve(app: Guard, sock: socket.socket, args: Namespace) -> None:
    """Answer requests until SIGTERM or Ctrl-C; answers that have begun are finished."""
    import uvicorn

    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"MiniVLM {app.bodies.name!r} answers at http://{host}:{args.port}/v1", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it has ended
    config = uvicorn.Config(app, log_level="info", ws="none", timeout_graceful_shutdown=GRACE)
    uvicorn.Server(config).run(sockets=[sock])
    print("The server has ended.", flush=True)
