"""A training loop of your own on Megatron-Core, with ep_comm's dispatcher in its MoE layers.

    torchrun --nproc_per_node=2 examples/own_loop.py

It runs on GPUs, one process each, or on CPU cores where there is no GPU. The ranks share the
experts of every layer. The model learns to count: its loss falls from above 4 to below 0.2.
"""

import os

import torch
import torch.distributed as dist

from ep_comm.megatron import EPOptions, check_model, cpu, synchronize_buffers, use_ep_comm

on_cpu = cpu.enable()  # before the first import of Megatron; does nothing where there is a GPU

from megatron.core import distributed as ddp  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

VOCABULARY, LENGTH, SEQUENCES, STEPS = 64, 128, 4, 30

if not on_cpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = torch.device("cpu" if on_cpu else "cuda")
dist.init_process_group("gloo" if on_cpu else "nccl")
parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
tensor_parallel.model_parallel_cuda_manual_seed(1)

config = TransformerConfig(
    num_layers=2,
    hidden_size=128,
    num_attention_heads=4,
    num_moe_experts=8,
    moe_router_topk=2,
    expert_model_parallel_size=dist.get_world_size(),
    moe_token_dispatcher_type="alltoall",  # Megatron checks the rest by it; ours takes its place
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    use_cpu_initialization=on_cpu,
    gradient_accumulation_fusion=False,  # needs Apex
)
spec = use_ep_comm(get_gpt_layer_local_spec(num_experts=8), EPOptions())
model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope").to(device)
model = ddp.DistributedDataParallel(config, ddp.DistributedDataParallelConfig(), model)
check_model([model])  # every MoE layer has our dispatcher, or this is an error
optimizer = get_megatron_optimizer(OptimizerConfig(lr=2e-3, clip_grad=1.0), [model])

torch.manual_seed(dist.get_rank())  # each rank has data of its own
positions = torch.arange(LENGTH, device=device).expand(SEQUENCES, -1)
for step in range(1, STEPS + 1):
    text = torch.arange(LENGTH + 1) + torch.randint(VOCABULARY, (SEQUENCES, 1))
    text = (text % VOCABULARY).to(device)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = model(text[:, :-1], positions, None, labels=text[:, 1:]).mean()
    loss.backward()
    ddp.finalize_model_grads([model])
    optimizer.step()
    synchronize_buffers()  # an error of the backward's kernels is raised here, not a step later
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
dist.destroy_process_group()
