"""The names of what figures were measured on."""

import platform
from pathlib import Path

import torch


def device_name(device: torch.device | str) -> str:
    """The accelerator's name, or the processor's."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    info = Path("/proc/cpuinfo")  # Linux, where `platform` knows the architecture alone
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
