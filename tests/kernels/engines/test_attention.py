"""The kernel of vLLM's attention: the same one in every step, or none that is covered."""

from types import SimpleNamespace

import pytest
import torch

from ndcheck_kernels.engines.plugin import CoverageError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def longest_told(vllm, head_size):
    """The longest query that FlashAttention is told of, by the step's own."""
    builder = vllm.Builder(head_size)
    steps = [SimpleNamespace(max_query_len=n) for n in (1, 9, 10, 300)]
    return [builder.build(0, step).max_query_len for step in steps]


def test_no_step_chooses_the_kernel_of_attention(begin):
    """FlashAttention 3 tells 1, up to 64 rows and up to 192 apart (vllm-project/vllm#51902)."""
    vllm = begin("auto")
    for head_size in (32, 64, 192, 256):
        told = longest_told(vllm, head_size)
        assert told[-1] == 300
        assert len(set(told[:-1])) == 1
        assert told[0] > 192
    assert longest_told(vllm, 128) == [1, 9, 10, 300]
    assert vllm.calls.count("attention_step") == 20
    vllm.worker(vllm.model(mixer=torch.nn.Linear(32, 32))).load_model()
    assert longest_told(vllm, 64) == [1, 9, 10, 300], "all is left to vLLM"


def other_builder(vllm, layer):
    layer.attn_backend.get_builder_cls = lambda: type("Other", (vllm.Builder,), {"build": max})


def window(head_size):
    def alter(_, layer):
        layer.sliding_window, layer.head_size = 4096, head_size

    return alter


@pytest.mark.parametrize(
    ("alter", "refused"),
    [
        (other_builder, "FLASH_ATTN, its kernel chosen by the step"),
        (window(64), "FLASH_ATTN, its kernel chosen by windows of 64 dimensions"),
        (window(256), "its kernel chosen by windows of 256 dimensions"),
        (window(128), None),
    ],
)
def test_attention_whose_kernel_the_step_chooses_is_refused(begin, alter, refused):
    vllm = begin()
    model = vllm.model()
    alter(vllm, model.layers[0].attn)
    if refused is None:
        vllm.worker(model).load_model()
    else:
        with pytest.raises(CoverageError, match=refused):
            vllm.worker(model).load_model()
