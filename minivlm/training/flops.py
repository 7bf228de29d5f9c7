"""Count the floating-point operations of a step, and know the peak of a GPU."""

import torch

from minivlm.model.parts import part_of

# Dense bf16 and fp16 FLOP/s by the makers' data sheets; MFU (arXiv 2204.02311, appendix B) is a share of them.
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
PEAK |= {"4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}


class FlopCounter:
    """FLOPs of a step's products with weights, forward and backward; the attention scores are left out, as in 6 N.

    A weight costs 2 FLOPs per token. It costs 2 more if it trains, and 2 more if an earlier layer trains, because the
    gradient goes through this weight to it.
    """

    def __init__(self, model: torch.nn.Module):
        self.cost, passed = dict.fromkeys(("picture", "answer", "token"), 0), False
        embedding, tower = model.get_input_embeddings().weight, model.model.vision_tower
        patches = model.config.patch_grid[0] * model.config.patch_grid[1]
        embeddings = {id(p) for name, p in tower.named_parameters() if "embedding" in name}
        convolutions = forward_flops(model) if model.config.is_convolutional else {}
        for name, parameter in model.named_parameters():
            part = part_of(name)
            flops = 2 * parameter.numel() * (1 + passed + parameter.requires_grad)
            passed = passed or parameter.requires_grad
            if parameter.ndim < 2 or parameter is embedding or id(parameter) in embeddings:
                continue
            if part == "vision":  # a convolution's weight serves as many places as its own map has
                passes = flops // (2 * parameter.numel())
                self.cost["picture"] += passes * convolutions.get(name, 2 * parameter.numel() * patches)
            elif part == "projector":
                self.cost["picture"] += flops * model.config.image_seq_length
            else:
                self.cost["answer" if part == "lm_head" else "token"] += flops
        if (
            model.get_output_embeddings().weight is embedding
        ):  # shared: counted once among the parameters, skipped above
            self.cost["answer"] += 2 * embedding.numel() * (1 + passed + embedding.requires_grad)

    def __call__(self, tokens: int, pictures: int, answers: int) -> int:
        return self.cost["token"] * tokens + self.cost["picture"] * pictures + self.cost["answer"] * answers


@torch.no_grad()
def forward_flops(model: torch.nn.Module) -> dict[str, int]:
    """Return the FLOPs that each convolution of the tower takes for one picture, by the name of its weight."""
    tower, names = model.model.vision_tower, {module: name for name, module in model.named_modules()}
    found, hooks = {}, []

    def count(module, inputs, output):
        found[f"{names[module]}.weight"] = 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            hooks.append(module.register_forward_hook(count))
    size, training = tower.config.image_size, tower.training
    tower.eval()(torch.zeros(1, tower.config.num_channels, size, size, device=tower.device, dtype=tower.dtype))
    tower.train(training)
    for hook in hooks:
        hook.remove()
    return found
