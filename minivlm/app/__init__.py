"""Show a page in the browser that answers questions about pictures; only `page.py` needs gradio."""
