"""Publish trained models on the Hugging Face Hub.

`publish.publish` checks the folder (`check`), writes its model card (`card`), and uploads it with retries (`retries`).
`background` does the same beside a running training. `secrets` removes the Hub's token from every message.
"""
