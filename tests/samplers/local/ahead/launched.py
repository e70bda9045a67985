"""Prints which kernels runs on an H200 launch, and which of them are foreseen. No GPU needed.

Arguments: for each run a directory with a config.json, from which a model is made, and options of
`make_spec` as JSON. Nothing is compiled: a kernel is named by all that Triton compiles it for.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from ndcheck.request import make_spec
from ndcheck.runner import plan
from ndcheck.samplers.local import sampler as sampler_module
from ndcheck.samplers.local.beside import compiling
from ndcheck.samplers.local.decoding import steps
from ndcheck.samplers.local.decoding.selection import Reading
from ndcheck_kernels.cuda.rows.logits import read_logits
from ndcheck_kernels.measure import ahead, resources
from ndcheck_kernels.models.decoder import fused_layers, join_weights
from ndcheck_kernels.scope import registry


def name_only(self, key, signature, device, *rest):
    kernel = SimpleNamespace(name=self.__name__, hash=f"{self.__name__} {key}")
    self.device_caches[device][0][key] = kernel
    return kernel


def read_step(logits, *_):
    read_logits(logits)
    ids, values = torch.full((len(logits),), 5), torch.zeros(len(logits))
    return Reading(ids, values, values, ids)


def read_pass(logits, *_):
    reading = read_step(logits.flatten(0, 1))
    return Reading(*(values.view(logits.shape[:2]).T for values in reading))


class Steps(steps.DecodeSteps):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._reads_passes = True


@contextmanager
def as_on_a_gpu():
    """CPU tensors take the ways of a GPU's."""
    registry.covered_ops("cpu")
    registry.covered_ops("cuda")
    with (
        patch.dict(registry._implementations, cpu=registry._implementations["cuda"]),
        patch.dict(registry._pointwise, clear=True),
        patch.dict(registry.resolved, clear=True),
        patch.multiple(steps, read_step=read_step, read_pass=read_pass),
        patch.multiple(
            sampler_module,
            DecodeSteps=Steps,
            fused_layers=lambda model, device: fused_layers(model),
        ),
    ):
        yield


def foresee(spec, decoder):
    with resources.compiling(90) as kernels:
        for launch in ahead.launches(ahead.Decoder(**decoder), *compiling._passes(spec)):
            launch()
    return {kernel.hash: kernel.name for kernel in kernels}


def run(spec):
    sampler = sampler_module.TransformersSampler(spec)
    join_weights(sampler.model)
    probes = {probe.probe_id: probe for probe in spec.probes}
    with resources.compiling(90) as kernels, as_on_a_gpu():
        for trial in plan(spec, sampler):
            if trial.arm == "invariant":
                sampler.sample(trial, probes[trial.probe_id], spec.decoding)
    return {kernel.hash: kernel.name for kernel in kernels}


def main(model, options):
    spec = make_spec(model=model, device="cpu", kernels=["stock", "invariant"], **options)
    config = json.loads((Path(model) / "config.json").read_text())
    foreseen, launched = foresee(spec, compiling._decoder(config, spec)), run(spec)
    kinds = {
        "met": launched.keys() & foreseen,
        "missed": launched.keys() - foreseen,
        "unneeded": foreseen.keys() - launched,
    }
    names = foreseen | launched
    found = {kind: sorted(names[key] for key in keys) for kind, keys in kinds.items()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    JITFunction._do_compile = name_only
    for model, options in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(model, json.loads(options))
