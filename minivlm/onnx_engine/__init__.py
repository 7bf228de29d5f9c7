"""Answer with exported ONNX graphs, without torch and transformers, whose import takes longer than an answer.

    graphs     the sessions of onnxruntime, and the loop that chooses token after token
    pixels     pictures to `pixel_values`, as the image processor does it
    prompt     messages to token ids, as the processor does it
    assistant  a folder of graphs, and the answers to conversations about pictures

Needs numpy, pillow, onnxruntime, tokenizers and jinja2.
"""
