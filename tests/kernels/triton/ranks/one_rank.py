"""One process of `test_ranks`: what a model computes, unfused and fused, written by rank 0.

Arguments: conftest.py of the folder above, a model's folder, into how many groups its sums are cut
(0: by rank), and the file to write. The kernels run under Triton's interpreter.
"""

import gc
import importlib.util
import os
import sys

import torch
import torch.distributed as dist
import transformers

conftest = importlib.util.spec_from_file_location("conftest", sys.argv[1])
conftest.loader.exec_module(importlib.util.module_from_spec(conftest))

from ndcheck.samplers.local.checkpoint.quantised import put_layers, read_quantisation  # noqa: E402
from ndcheck.samplers.local.sharding import draw_weights, find_shards, shard  # noqa: E402
from ndcheck_kernels import invariant_kernels, invariant_model  # noqa: E402
from ndcheck_kernels.models.caches.argument import cache_argument  # noqa: E402
from ndcheck_kernels.models.decoder import fused_layers  # noqa: E402
from ndcheck_kernels.scope import registry  # noqa: E402

PROMPTS = [[5, 17, 90, 33, 21, 8, 64, 2, 11], [3] * 5]
STEP = 4


def make_model(folder, n_ranks):
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    if n_ranks > 1:
        model = shard(model, n_ranks)
    shards = find_shards(model)
    if found := read_quantisation(config):
        put_layers(model, found)
    draw_weights(model, 0, torch.device("cpu"), shards)
    return model.eval()


@torch.no_grad()
def logits_of(model, prompts):
    """Of the prompts' last tokens and of one more: [B, 2, V]."""
    length = max(map(len, prompts))
    pads = torch.tensor([length - len(p) for p in prompts])
    mask = (torch.arange(length + 1) >= pads[:, None]).long()
    cache = transformers.StaticCache(config=model.config, max_cache_len=length + 1)
    padded = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    rows, begin = [], 0
    for ids in (padded, torch.full((len(prompts), 1), STEP)):
        columns = torch.arange(begin, begin + ids.shape[1])
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(columns - pads[:, None]).clamp(min=0),
            logits_to_keep=1,
            **{cache_argument(model.forward): cache},
        )
        begin += ids.shape[1]
        rows.append(out.logits[:, -1])
    return torch.stack(rows, 1)


def main():
    folder, groups, out = sys.argv[2:]
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks > 1:
        dist.init_process_group("gloo")
    registry.covered_ops("cpu")
    registry.covered_ops("cuda")
    registry._implementations["cpu"] = registry._implementations["cuda"]
    model = make_model(folder, n_ranks)
    with invariant_model(model, int(groups) or None), invariant_kernels() as scope:
        plain = logits_of(model, PROMPTS)
        before = scope.fires.copy()
        with fused_layers(model) as n_fused:
            fused = logits_of(model, PROMPTS)
            fires = scope.fires - before
            alone = logits_of(model, PROMPTS[:1]) if n_fused else None
    if int(os.environ.get("RANK", "0")) == 0:
        found = {"plain": plain, "fused": fused, "alone": alone}
        torch.save({**found, "n_fused": n_fused, "fires": dict(fires)}, out)
    if n_ranks > 1:
        del model
        dist.destroy_process_group()
        gc.collect()  # gloo's threads abort a process that ends with them.


main()
