"""A policy that FSDP2 shards on CPUs; accelerate shards only on GPUs."""

import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Sharding(Accelerator):
    """Prepares a policy as accelerate does with FSDP2: block by block, then the rest."""

    def prepare(self, module, optimizer):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        names = {id(p): name for name, p in module.named_parameters()}
        for block in module.lm.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        sharded = dict(module.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(p)]] for p in group["params"]]
        return module, optimizer

    def backward(self, loss):
        loss.backward()
