"""BatchNorm over all processes, on GPUs and on CPUs.

torch's SyncBatchNorm refuses CPU tensors; on CPUs the class here computes the same with differentiable all-reduces, so
that several processes can be compared with one where there is no GPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from composer import Callback, Logger, State
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the batches of all processes together.

    Input and output (N, C, H, W). N may differ between processes. Without a process group it is BatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in training with the statistics over all processes."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        channels, shape = input.shape[1], (1, -1, 1, 1)
        count: Tensor = all_reduce(input.new_tensor(input.numel() / channels))
        mean: Tensor = all_reduce(input.sum((0, 2, 3))) / count
        centred = input - mean.view(shape)
        variance: Tensor = all_reduce(centred.square().sum((0, 2, 3))) / count
        if self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():  # without `track_running_stats` there are none of the three
                self.num_batches_tracked += 1
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if not self.affine:
            return output
        return output * self.weight.view(shape) + self.bias.view(shape)


def _on_cpu(module: nn.Module) -> nn.Module:
    """Every BatchNorm2d below `module` as the CPU's synchronised one, with the same parameters and buffers."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = CPUSyncBatchNorm2d
        else:
            setattr(module, name, _on_cpu(child))
    return module


def convert(network: nn.Module, device_type: str) -> nn.Module:
    """The network with synchronised BatchNorm.

    Args:
        network: A model of torchvision or timm.
        device_type: torch's name of the device type: `cpu` takes the class above, others torch's SyncBatchNorm.
    """
    if device_type == "cpu":
        return _on_cpu(network)
    # timm's handles its own BatchNormAct2d, and everything else as torch's does.
    from timm.layers.norm_act import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(network)
    return converted


class SameStatistics(Callback):
    """Evaluates with the first process's running statistics everywhere.

    DDP copies them before each training step, so after a step each process has added its own batch to them; without
    this an evaluation shared by several processes would be of several models.
    """

    def eval_start(self, state: State, logger: Logger) -> None:
        """Runs after EMA and its like have put their weights in place."""
        del logger
        if dist.is_initialized():
            for buffer in state.model.buffers():
                dist.broadcast(buffer, src=0)
