"""Compute what training minimises: the loss of the answers, and what is added to it."""

import torch
from accelerate import Accelerator

from minivlm.data.encoder import IGNORE
from minivlm.training.chunked_loss import ChunkedLoss, is_large
from minivlm.training.device import SHARDED
from minivlm.training.grounding import grounding_loss

SUMS = ("loss", "imbalance", "grounding")  # what `compute_loss` reports of a micro-batch; the loss comes first


def z_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return a scalar: the sum of squared log-partitions of `logits` (1, K, vocabulary) with a label in `labels`.

    Source: PaLM (arXiv 2204.02311, section 5).
    """
    return logits.float().logsumexp(-1)[labels != IGNORE].square().sum()


def load_balance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return a scalar that grows when a mixture uses its experts unequally, summed over the blocks.

    E times the sum over experts of the share of tokens that an expert gets times its mean probability (Switch
    Transformer, arXiv 2101.03961, equations 4 to 6): `top_k` per block if all are used alike, E at most.
    """
    total = 0.0
    for logits in router_logits:
        shares = logits.float().softmax(-1)  # (tokens, E)
        sent = torch.zeros_like(shares).scatter(1, shares.topk(top_k).indices, 1.0)
        total = total + shares.shape[1] * (sent.mean(0) * shares.mean(0)).sum()
    return total


def sum_losses(model, tensors: dict, z: float, extra: dict, accelerator: Accelerator):
    """Return the outputs of a model, and its summed loss with and without the z-loss, each ().

    If the logits are too many to be held at once the model computes none: the LM head reads its last hidden states
    here, some tokens at a time. Weights that are cut into shards are whole only inside the model.
    """
    kept, labels, head = tensors["logits_to_keep"], tensors["shift_labels"], accelerator.unwrap_model(model).lm_head
    if is_large(labels, head) and accelerator.distributed_type not in SHARDED:
        inputs = {name: value for name, value in tensors.items() if name != "shift_labels"}
        inputs["logits_to_keep"] = torch.zeros_like(kept)
        outputs = model(**inputs, use_cache=False, **extra | {"output_hidden_states": True})
        return outputs, *ChunkedLoss.apply(outputs.hidden_states[-1][kept], head.weight, labels.flatten(), z)
    outputs = model(**tensors, labels=labels, use_cache=False, num_items_in_batch=1, **extra)
    objective = outputs.loss + z * z_loss(outputs.logits, labels) if z else outputs.loss
    return outputs, objective, outputs.loss


def compute_loss(model, tensors: dict[str, torch.Tensor], answers: torch.Tensor, args, accelerator):
    """Return what a micro-batch minimises, (), and its share of `SUMS`, (3,).

    The loss is divided by the answer tokens of all ranks and micro-batches. A mean of micro-batch means would let a
    row with three answer tokens pull as hard as one with three hundred.

    Args:
        model: as Accelerate prepared it.
        answers: answer tokens of all ranks and micro-batches of the step, ().
        args: options of training.
    """
    labels, plain = tensors["shift_labels"], accelerator.unwrap_model(model)
    text, extra = plain.config.text_config, {}
    is_grounded = args.grounding_loss and "grounding" in tensors
    if getattr(text, "num_experts", 0):
        extra["output_router_logits"] = True
    if is_grounded:
        extra["output_hidden_states"] = True
    inputs = {key: value for key, value in tensors.items() if key != "grounding"}
    imbalance = grounded = torch.zeros((), device=labels.device)
    with accelerator.autocast():
        outputs, objective, loss = sum_losses(model, inputs, args.z_loss, extra, accelerator)
        objective, loss = objective / answers, loss / answers
        if is_grounded:
            grounded = grounding_loss(plain, outputs.hidden_states, tensors) / answers
            objective = objective + args.grounding_loss * grounded
    if outputs.router_logits:  # without this term a mixture soon asks one expert for everything
        share = (labels != IGNORE).sum() / answers  # of this micro-batch in the step
        balance = share * load_balance(outputs.router_logits, text.num_experts_per_tok)
        objective, imbalance = objective + text.router_aux_loss_coef * balance, balance / text.num_hidden_layers
    # The product undoes the mean that DDP, FSDP and ZeRO take over ranks.
    return objective * accelerator.num_processes, torch.stack([loss, imbalance, grounded]).detach()
