"""Serve a model in OpenAI's format: transformers' own server, with a guard in front that reads each request first.

`limits.py` has the limits and refusals, `bodies.py` checks a request, `remote.py` fetches pictures of allowed hosts,
`guard.py` is the ASGI middleware, and `launch.py` starts the server; only that file needs fastapi and uvicorn.
"""
