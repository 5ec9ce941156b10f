"""Random weights for networks that are too large to train or to ship."""

import torch

from uplift_diffusers.evaluation.metrics import Inception


def random_inception() -> dict[str, torch.Tensor]:
    """Of the Inception network of FID, in torch-fidelity's layout, without its last layer."""
    torch.manual_seed(11)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return network.state_dict()
