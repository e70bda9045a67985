"""The gated delta rule: a row's bits are the same in whole prompts, chunks, steps and company."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from ndcheck_kernels import invariant_kernels, invariant_model
from ndcheck_kernels.cuda.recurrent.gated_delta import gated_delta_rule
from ndcheck_kernels.measure.reference import gated_delta_reference
from ndcheck_kernels.models.caches.argument import cache_argument

KEY_HEADS, HEADS, D, D_V = 1, 2, 16, 24
LENGTH = 37


def draw(n_rows, length, dtype, device):
    """(query, key, value, decay, beta), with a decay that keeps the first tokens in the state."""

    def normal(*shape):
        return torch.randn(n_rows, length, *shape, device=device).to(dtype)

    decay = -torch.rand(n_rows, length, HEADS, device=device) / 8
    query, key, value = normal(KEY_HEADS, D), normal(KEY_HEADS, D), normal(HEADS, D_V)
    return query, key, value, decay, normal(HEADS).sigmoid()


def run(operands, sizes=None):
    """Output and state after all tokens, taken `sizes` at a time."""
    n_rows, length = operands[0].shape[:2]
    state = torch.zeros(n_rows, HEADS, D, D_V, device=operands[0].device)
    parts = zip(*(x.split(sizes or length, dim=1) for x in operands), strict=True)
    return torch.cat([gated_delta_rule(*part, state, True) for part in parts], 1), state


def exact(operands):
    """By the definition, in float64."""
    query, key, *others = operands
    return gated_delta_reference(*(x.repeat_interleave(HEADS, 2) for x in (query, key)), *others)


def test_as_accurate_as_the_definition_in_float32(dtype, device, assert_accurate):
    operands = draw(2, LENGTH, dtype, device)
    from transformers.models.qwen3_next import modeling_qwen3_next as source

    query, key, value, decay, beta = operands
    keys = [x.repeat_interleave(HEADS, 2) for x in (query, key)]
    stock, _ = source.torch_recurrent_gated_delta_rule(
        *keys, value, g=decay, beta=beta, initial_state=None, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert_accurate(run(operands)[0], exact(operands), stock)


def test_a_decay_by_channel_is_that_of_a_head_where_all_are_equal(dtype, device):
    query, key, value, decay, beta = draw(2, 9, dtype, device)
    by_channel = decay[..., None].expand(*decay.shape, D)
    got, state = run((query, key, value, by_channel, beta))
    expected, expected_state = run((query, key, value, decay, beta))
    assert torch.equal(got, expected)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("length", [1, 2, 3, 16, LENGTH, 65])
def test_the_state_after_a_prompt_is_that_after_its_steps(length, dtype, device):
    operands = draw(1, length, dtype, device)
    whole, state = run(operands)
    for size in {1, 7}:
        got, got_state = run(operands, size)
        assert torch.equal(got, whole), size
        assert torch.equal(got_state, state), size


def test_padding_slot_and_neighbours_change_no_bit(dtype, device):
    operands = draw(2, 9, dtype, device)
    whole, state = run(operands)
    for n_pads in range(1, 65) if device == "cuda" else (1, 5, 16):
        # A padded column has zeros for the projections of its token, but beta = sigmoid(0).
        padded = [
            F.pad(x[1:2], (0, 0) * (x.dim() - 2) + (n_pads, 0), value=0.5 if i == 4 else 0.0)
            for i, x in enumerate(operands)
        ]
        strange = [torch.full_like(x, torch.nan) for x in padded]
        batch = [torch.cat([s, x]) for s, x in zip(strange, padded, strict=True)]
        got, got_state = run(batch, 20)
        assert torch.equal(got[1, n_pads:], whole[1]), n_pads
        assert torch.equal(got_state[1], state[1]), n_pads


def test_views_of_one_projection_have_the_bits_of_its_copies(dtype, device):
    query, key, value, decay, beta = draw(2, 5, dtype, device)
    joined = torch.cat([x.flatten(2) for x in (query, key, value)], -1)
    parts = joined.split([KEY_HEADS * D, KEY_HEADS * D, HEADS * D_V], -1)
    views = [x.view(y.shape) for x, y in zip(parts, (query, key, value), strict=True)]
    assert torch.equal(run((*views, decay, beta))[0], run((query, key, value, decay, beta))[0])


def test_chunks_that_forget_the_last_bit_are_caught(dtype, device):
    """The planted fault: a state in bfloat16 between chunks."""
    operands = draw(1, LENGTH, dtype, device)
    _, state = run([x[:, :20] for x in operands])
    rounded = state.bfloat16().float()
    got = gated_delta_rule(*(x[:, 20:] for x in operands), rounded, True)
    assert not torch.equal(got, run(operands)[0][:, 20:])


def test_a_state_of_another_dtype_is_refused(device):
    operands = draw(1, 2, torch.float32, device)
    state = torch.zeros(1, HEADS, D, D_V, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="the state of a gated delta rule is float32"):
        gated_delta_rule(*operands, state, True)


@pytest.fixture(params=["qwen3_5_text", "qwen3_next"])
def model(request, device):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        decoder_sparse_step=1, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(device).eval()


@pytest.mark.usefixtures("cuda_registrations")
def test_a_model_gives_a_padded_row_the_bits_it_has_alone(model, device):
    ids = torch.randint(1, 64, (1, 12), device=device)

    def logits(n_pads, sizes):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        tokens = F.pad(ids, (n_pads, 0))
        if n_pads:
            tokens = torch.cat([torch.ones_like(tokens), tokens])
        mask = torch.ones_like(tokens)
        mask[-1, :n_pads] = 0
        positions = (torch.arange(tokens.shape[1], device=device) - n_pads).clamp(min=0)
        out, begin = [], 0
        for size in (n_pads + sizes[0], *sizes[1:]):
            end = begin + size
            out.append(
                model(
                    input_ids=tokens[:, begin:end], attention_mask=mask[:, :end],
                    position_ids=positions[None, begin:end].expand(len(tokens), -1),
                    use_cache=True, **{cache_argument(model.forward): cache},
                ).logits[-1]
            )  # fmt: skip
            begin = end
        return torch.cat(out)[n_pads:]

    with torch.inference_mode(), invariant_model(model), invariant_kernels() as scope:
        whole = logits(0, [12])
        assert torch.equal(logits(0, [5, 4, 1, 1, 1]), whole)
        assert torch.equal(logits(3, [9, 1, 2]), whole)
    assert scope.fires["gated_delta_rule"] == 9
    assert scope.fires["short_convolution"] == 5
    assert scope.fires["short_convolution_step"] == 4
