"""Set up the device: processes and their precision, compiled blocks."""

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import ProjectConfiguration

from minivlm.training.options import TrainArgs
from minivlm.training.precision import supports_bf16

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_accelerator(args: TrainArgs) -> Accelerator:
    """Return the Accelerator of this process in the precision that was asked for.

    Raises:
        ValueError: an option does not work with weights that are cut into shards.
    """
    precision = args.mixed_precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(PartialState(cpu=args.device == "cpu").device) else "no"
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
        precision = "no"
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=precision,
        log_with=args.trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=args.output_dir),
    )
    sharded = accelerator.distributed_type in SHARDED
    if sharded and (args.optimizer != "adamw" or args.ema or args.eval_every or args.push_every or args.compile):
        raise ValueError(
            f"{accelerator.distributed_type.value} cuts the weights into shards: use --optimizer adamw without --ema, "
            "--eval_every, --push_every or --compile (eval_data is still answered at the end), or a DDP configuration."
        )
    if sharded and args.grounding_loss:
        raise ValueError(
            f"{accelerator.distributed_type.value} cuts the weights into shards, --grounding_loss reads them whole. "
            "Leave it out, or use a DDP configuration."
        )
    if plugin := accelerator.state.deepspeed_plugin:  # it would read these from the loader, which it is not given
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = max(1, args.micro_batch_size)
        plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1  # the loss is divided by answer tokens already
    return accelerator


def compile_blocks(model: torch.nn.Module, device: torch.device) -> None:
    """Compile each block by itself: equal blocks share the compiled code, so start-up stays short.

    Where compilation fails (no C++ compiler, no Python headers, a path with spaces) print why, and leave the model.
    """
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
    except Exception as error:  # inductor raises several classes for a missing compiler or header
        reason = " ".join(str(error).split("\n", 2)[:2])
        remedy = "On Debian: apt install g++ python3-dev"
        if " " in torch.__file__:  # inductor does not quote the path of PyTorch's headers
            remedy = f"PyTorch lies in a path with spaces, {torch.__file__}: use another one"
        print(f"Not compiled, training will be slower: {reason}. {remedy}.")
        return
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                block.compile(dynamic=True)  # batches differ in length; compiled once for all of them
