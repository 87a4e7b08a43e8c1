"""How a model comes into memory and out of it, whole or sharded by FSDP2, with a LoRA or without; its AdamW.

`sharded` reads weights once for all processes, `whole` gives them back as transformers stores them, and
`unsharded` makes a model whole for a while, for sampling. `add_lora` freezes a model and trains a LoRA on it;
`WithoutLora` is the model as it was, the reference that takes no memory.
"""

import json
import re
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "adamw8bit"]
UNREADABLE = (
    ImportError,
    OSError,
    ValueError,
    SafetensorError,
)  # ImportError: an --attn that is not installed


def check_packages(args):
    """Raise ImportError, with what to do, where a flag needs a package that is not there."""
    wanted = {"peft==0.21.2": args.lora_rank, "torchao==0.18.0": args.optimizer == "adamw8bit"}
    for package in (package for package, is_wanted in wanted.items() if is_wanted):
        if not find_spec(package.partition("==")[0]):
            raise ImportError(f"--lora-rank and --optimizer adamw8bit need more: pip install {package}")


# ------------------------------------------------------------------------------------------------------------
# FSDP2
# ------------------------------------------------------------------------------------------------------------
def sharded(load, compute: torch.dtype, device):
    """load()'s model, sharded over all processes, which computes in `compute` and reduces in float32.

    Only the first process calls load(). The others get the model on `meta`, and then their shards: hosts hold
    one copy of the weights, a GPU nothing but its part. A reward head, `score`, stays in float32.
    """
    weights, found = {}, [None, None]
    if dist.get_rank() == 0:
        model = load()
        weights, buffers = model.state_dict(), dict(model.named_buffers())
        found = [model.to("meta"), buffers]
    dist.broadcast_object_list(found)
    model, buffers = found
    model.tie_weights()  # on another device, and in another process, one tensor has become two
    mixed = {"param_dtype": compute, "reduce_dtype": torch.float32}
    if hasattr(model, "score"):
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float32)
        fully_shard(model.score, mp_policy=exact)
    for layer in layers_of(model):
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(**mixed))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**mixed, cast_forward_inputs=False))
    model.to_empty(device=device).tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def layers_of(model) -> list:
    """The transformer layers of a model: what is sharded, or compiled, one by one."""
    names = model._no_split_modules
    return [m for m in model.modules() if any(kind.__name__ in names for kind in type(m).__mro__)]


def whole(model) -> tuple:
    """A model's plain twin on `meta`, and its weights by name on the first process' CPU, for save_pretrained.

    They are bfloat16 where that is computed with and they were stored so. What is computed in float32 stays
    float32: rounded, a small learning rate's updates would be lost. Of a LoRA they are the LoRA's, float32.
    """
    dtype = model.stored_dtype if model.compute_dtype == torch.bfloat16 else torch.float32
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    plain = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        twin = plain._from_config(model.config, dtype=dtype)
    twin.generation_config = model.generation_config
    if model._hf_peft_config_loaded:
        twin.add_adapter(model.peft_config["default"])
    for name in set(weights) & set(twin.all_tied_weights_keys):  # stored once, as the embeddings
        del weights[name]
    return twin, {k: x if ".lora_" in k else x.to(dtype) for k, x in weights.items()}


def fsdp_forward(function, keep: bool = False):
    """Let function(model, ...) run inside FSDP2's hooks: outside, the root's parameters stay sharded.

    FSDP2 leaves a root whole for a backward pass. A frozen one is sharded again at once, unless `keep`.
    """

    @wraps(function)
    def inside(model, *args, **kwargs):
        if isinstance(model, WithoutLora):
            with model:
                return inside(model.model, *args, **kwargs)
        if not isinstance(model, FSDPModule):
            return function(model, *args, **kwargs)
        name = f"_{function.__name__}"
        if not hasattr(model, name):
            setattr(model, name, MethodType(function, model))
            register_fsdp_forward_method(model, name)
        result = getattr(model, name)(*args, **kwargs)
        if not (keep or any(parameter.requires_grad for parameter in model.parameters())):
            model.reshard()
        return result

    return inside


def unsharded(function):
    """Let function(model, ...) find FSDP2's parameters whole on every process, sharded again behind it.

    Sampling then needs no communication per token; an optimizer over whole parameters would update copies.
    """

    @wraps(function)
    def inside(model, *args, **kwargs):
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            return function(model, *args, **kwargs)
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not model, recurse=False)
                module.reshard()

    return inside


# ------------------------------------------------------------------------------------------------------------
# Optimizer
# ------------------------------------------------------------------------------------------------------------
def adamw(args, *models):
    """AdamW over all that is trained, two groups a model: matrices, which decay, and vectors, which do not.

    `args` has optimizer, adam_betas, weight_decay. The moments of adamw8bit are torchao's, for blocks of 256.
    """
    groups = []
    for model in models:
        for is_matrix, weight_decay in ((True, args.weight_decay), (False, 0.0)):
            parameters = [p for p in model.parameters() if (p.ndim > 1) == is_matrix]
            groups.append({"params": parameters, "weight_decay": weight_decay})
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=args.adam_betas, fused=True)
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(groups, betas=args.adam_betas)

    def learning_rates(kind):  # a number would be compiled in, anew at every step
        def change(*_):
            for group in optimizer.param_groups:
                group["lr"] = kind(group["lr"])

        return change

    optimizer.register_step_pre_hook(learning_rates(partial(torch.as_tensor, dtype=torch.float64)))
    optimizer.register_step_post_hook(learning_rates(float))
    return optimizer


def clip_grad_norm(model, max_norm: float) -> float:
    """Scale a model's gradients, sharded or not, down to `max_norm`; their norm as it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


# ------------------------------------------------------------------------------------------------------------
# LoRA
# ------------------------------------------------------------------------------------------------------------
def add_lora(model, args):
    """Freeze a model; linear layers W become W + alpha / rank B A, at first B = 0 (arXiv:2106.09685, 4.1).

    `args` has lora_rank, lora_alpha, lora_target, seed. A and B are float32; a reward head is trained whole.
    """
    from peft import LoraConfig

    torch.manual_seed(args.seed)  # of A
    settings = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "target_modules": args.lora_target}
    model.add_adapter(LoraConfig(**settings, modules_to_save=["score"] if hasattr(model, "score") else None))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.data = parameter.data.float()
    return model


class WithoutLora:
    """What a model was before `add_lora`, for `token_logprobs`: a reference that takes no memory."""

    def __init__(self, model):
        self.model = model
        self.layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]

    def eval(self):
        self.model.eval()

    def __enter__(self):
        for layer in self.layers:
            layer._disable_adapters = True  # peft's enable_adapters(False) would also freeze A and B

    def __exit__(self, *_):
        for layer in self.layers:
            layer._disable_adapters = False


class SavedLora:
    """A LoRA as peft saves it in a folder: what it adds to the weights `names` of `base`, alpha / r B A.

    Raises ValueError where it does more than that.
    """

    def __init__(self, folder: Path):
        lora = json.loads((folder / "adapter_config.json").read_bytes())
        more = "use_dora use_rslora fan_in_fan_out rank_pattern alpha_pattern modules_to_save lora_bias"
        if lora["peft_type"] != "LORA" or any(map(lora.get, more.split())):
            raise ValueError("an adapter of peft that is more than a plain LoRA; merge it with peft")
        self.base, self.scale = lora["base_model_name_or_path"], lora["lora_alpha"] / lora["r"]
        self.weights = safe_open(folder / "adapter_model.safetensors", framework="pt")
        self.names = {re.sub(r"^base_model\.model\.|lora_[AB]\.", "", key) for key in self.weights.keys()}

    def addition(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of what it adds to a weight (out, in), in float32."""
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = (self.weights.get_tensor(f"{key}{x}.weight").float() for x in "AB")  # (r, in), (out, r)
        return self.scale * (b[rows] @ a)
