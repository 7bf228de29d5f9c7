"""The library and the command of MiniVLM; the model itself is in the three files `*_minivlm.py` beside this package.

    data         from files to batches
    model        load and save models, join backbones, choose what trains
    inference    from pictures and words to answers
    onnx_engine  the same from ONNX graphs, without torch and transformers
    training     options, optimizers, devices, checkpoints, reports
    evaluation   scores, contact sheets, benchmarks
    hub          publish a model with its card
    convert      other formats in and out
    commands     `minivlm COMMAND`, a file each

Imports go one way: data, model, hub < inference, onnx_engine < evaluation, training, convert < commands.
"""
