"""Choose bf16 where the device has instructions for it: without them it is many times slower than fp32."""

import torch


def supports_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def autocast(device: torch.device | str) -> torch.autocast:
    """Return the context that computes in bf16 if the device has instructions for it; else fp32 is faster."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=supports_bf16(device))
