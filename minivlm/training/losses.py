"""Compute what training minimises: the loss of the answers, and what is added to it."""

import torch

from minivlm.data.encoder import IGNORE
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
        outputs = model(**inputs, labels=labels, use_cache=False, num_items_in_batch=answers, **extra)
        if is_grounded:
            grounded = grounding_loss(plain, outputs.hidden_states, tensors) / answers
    objective = outputs.loss + args.grounding_loss * grounded
    if args.z_loss:
        objective = objective + args.z_loss * z_loss(outputs.logits, labels) / answers
    if outputs.router_logits:  # without this term a mixture soon asks one expert for everything
        share = (labels != IGNORE).sum() / answers  # of this micro-batch in the step
        balance = share * load_balance(outputs.router_logits, text.num_experts_per_tok)
        objective, imbalance = objective + text.router_aux_loss_coef * balance, balance / text.num_hidden_layers
    # The product undoes the mean that DDP, FSDP and ZeRO take over ranks.
    return objective * accelerator.num_processes, torch.stack([outputs.loss, imbalance, grounded]).detach()
