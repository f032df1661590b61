"""Packed documents, however a collator says where they start, are documents read alone; what is silent is refused."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from dualform import testing as laws
from dualform.models import DualformConfig, DualformForCausalLM

kinds = {
    "learner": {"preset": "tiny-ttt-mlp", "num_hidden_layers": 2, "use_gate": True, "share_qk": True},
    "hybrid": {
        "preset": "tiny-ttt-linear", "num_hidden_layers": 3, "sliding_window": 5,
        "layer_types": ["test_time", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4, "initializer_range": 0.3}
lengths = (6, 1, 7)
T = sum(lengths)


def build(kind):
    torch.manual_seed(0)
    return DualformForCausalLM(DualformConfig(**{**sizes, **kinds[kind]})).double().eval()


@pytest.fixture(scope="module", params=kinds)
def model(request):
    return build(request.param)


ids = torch.randint(3, 259, (1, T), generator=torch.Generator().manual_seed(1))
parts = ids.split(lengths, 1)
numbers = torch.repeat_interleave(torch.tensor([1, 2, 3]), torch.tensor(lengths))[None]
positions = torch.cat([torch.arange(n) for n in lengths])[None]
shifts = torch.tensor([[5, 90, 3]]).gather(1, numbers - 1)


def collated(**options):
    batch = DataCollatorWithFlattening(**options)([{"input_ids": part[0].tolist()} for part in parts])
    return {name: x for name, x in batch.items() if name not in ("labels", "input_ids")}


ways = {
    "positions from 0": collated(),
    "positions from 2": collated(position_ids_start=2),
    "seq_idx": collated(return_position_ids=False, return_seq_idx=True),
    "cumulative lengths": collated(return_position_ids=False, return_flash_attn_kwargs=True),
    "all of them": collated(return_seq_idx=True, return_flash_attn_kwargs=True),
    "parts of documents": {"position_ids": positions + shifts},
    "and a mask of ones": {"position_ids": positions, "attention_mask": torch.ones_like(ids)},
    "numbers": {"attention_mask": numbers},
    "numbers as floats": {"attention_mask": numbers.float()},
    "other numbers": {"attention_mask": numbers * 3 - 1},
    "reset": {"reset": positions == 0},
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ways)
def test_documents_are_read_alone(model, way):
    alone = [model(part, use_cache=False).logits for part in parts]
    packed = model(ids, use_cache=False, **ways[way]).logits
    laws.agree("logits", packed, torch.cat(alone, 1))
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2), dtype=packed.dtype)
    want = gradients(model, (torch.cat(alone, 1) * weights).sum())
    for name, got in gradients(model, (packed * weights).sum()).items():  # through norms, which are float32
        torch.testing.assert_close(got, want[name], rtol=1e-6, atol=1e-6 * float(want[name].abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_numbers_stand_among_padding(model, side):
    at = {"left": 0, "right": T, "between": lengths[0]}[side]
    padded = torch.cat([ids[:, :at], torch.zeros(1, 4, dtype=torch.long), ids[:, at:]], 1)
    mask = torch.cat([numbers[:, :at], torch.zeros(1, 4, dtype=torch.long), numbers[:, at:]], 1)
    packed = model(padded.repeat(2, 1), attention_mask=mask.repeat(2, 1), use_cache=False).logits
    want = torch.cat([model(part).logits for part in parts], 1)
    for row in packed:
        laws.agree("logits", row[mask[0] > 0][None], want)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[3, 11], [6, 8], [1] * T])
def test_numbers_over_past_and_new_columns_cut_anywhere(model, cuts):
    cache, found, start = None, [], 0
    for n in cuts:
        out = model(ids[:, start : start + n], attention_mask=numbers[:, : start + n], cache=cache, use_cache=True)
        cache, start = out.cache, start + n
        found.append(out.logits)
    laws.agree("logits", torch.cat(found, 1), torch.cat([model(part).logits for part in parts], 1))


@torch.no_grad()
@pytest.mark.parametrize("way", ways)
def test_generation_goes_on_from_the_last_document(model, way):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(parts[-1], **options)
    found = model.generate(ids, **options, **ways[way])
    assert torch.equal(found[:, T - lengths[-1] :], want)


@torch.no_grad()
def test_padding_that_positions_count_starts_nothing(model):
    padded, mask = torch.zeros(1, T + 3, dtype=torch.long), torch.ones(1, T + 3, dtype=torch.long)
    padded[:, :5], padded[:, 8:], mask[:, 5:8] = ids[:, :5], ids[:, 5:], 0
    for counted in (torch.arange(T + 3)[None], (mask.cumsum(1) - 1)):
        found = model(padded, attention_mask=mask, position_ids=counted).logits[mask.bool()]
        if "full_attention" not in model.config.layer_types or counted[0, -1] == T - 1:
            laws.agree("logits", found[None], model(ids).logits)
    laws.agree("shifted", model(ids, position_ids=torch.arange(T) + 50).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("way", ["positions from 2", "numbers", "seq_idx"])
def test_compiled_it_is_the_same(way):
    torch._dynamo.reset()
    model = build("hybrid")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    laws.agree(way, compiled(ids, use_cache=False, **ways[way]).logits, model(ids, use_cache=False, **ways[way]).logits)


def carried(model):
    return model(ids[:, :4], use_cache=True).cache


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda m: {"attention_mask": torch.full((1, T), 0.5)}, r"attention_mask holds 0\.5; expected 1 for tokens"),
        (lambda m: {"attention_mask": -ids}, r"attention_mask holds -\d+; expected 1 for tokens and 0 for padding"),
        (lambda m: {"attention_mask": torch.zeros(1, T).log()}, r"attention_mask holds -inf; .*not one that is added"),
        (lambda m: {"attention_mask": torch.zeros(1, T) * torch.nan}, r"attention_mask holds nan"),
        (lambda m: {"attention_mask": numbers.flip(1)}, r"numbers documents that fall along a row; expected"),
        (lambda m: {"attention_mask": numbers, "cache": carried(m)}, r"numbers documents over 14 columns with 4 read "
        r"before"),
        (lambda m: {"seq_idx": numbers[:, 1:]}, r"seq_idx has shape \(1, 13\); expected \(batch, tokens\) = \(1, 14\)"),
        (lambda m: {"seq_idx": numbers, "cache": carried(m)}, r"seq_idx has shape \(1, 14\) after 4 columns"),
        (lambda m: {"position_ids": positions, "cache": carried(m)}, r"position_ids begin a document among 14 .* from "
        r"4 read"),
        (lambda m: {"cu_seq_lens_q": torch.tensor([0, 6, 13])}, r"cu_seq_lens_q is \[0, 6, 13\]; "
        r"expected .* tokens = 14"),
        (lambda m: {"cu_seq_lens_q": torch.tensor([0, 9, 7, 14])}, r"cu_seq_lens_q is \[0, 9, 7, 14\]; "
        r"expected lengths that grow"),
        (lambda m: {"is_causal": False}, r"is_causal is False; expected a causal"),
    ],
)  # fmt: skip
def test_what_says_no_documents_is_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        model(ids, **given(model))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(ids, positions_ids=ids), "DualformForCausalLM: unknown argument 'positions_ids'. "
        "Did you mean 'position_ids'"),
        (lambda m: m(ids, cache_params=1), "unknown argument 'cache_params'. Did you mean 'cache'"),
        (lambda m: m.model(ids, atention_mask=ids), "DualformModel: unknown argument 'atention_mask'. "
        "Did you mean 'attention_mask'"),
        (lambda m: m.generate(ids, max_new_tokns=3), "generate: unknown argument 'max_new_tokns'. "
        "Did you mean 'max_new_tokens'"),
        (lambda m: m.generate(ids, rest=ids), "generate: unknown argument 'rest'. Did you mean 'reset'"),
    ],
)  # fmt: skip
def test_an_argument_that_nobody_reads_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
