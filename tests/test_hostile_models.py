"""Language models and layers, as found by people who came from outside: transforms, padding that holds NaN."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

import dualform as df
from dualform.models import DualformConfig, DualformForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "chunk": 4, "initializer_range": 0.3}
kinds = {
    "learner": {"preset": "tiny-ttt-mlp", "num_hidden_layers": 2, "use_gate": True, "share_qk": True},
    "hybrid": {
        "preset": "tiny-ttt-linear", "num_hidden_layers": 3, "sliding_window": 5, "share_qk": True,
        "layer_types": ["test_time", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
N, B, T = 3, 2, 11


@pytest.fixture(params=kinds)
def model(request):
    torch.manual_seed(0)
    return DualformForCausalLM(DualformConfig(**sizes, **kinds[request.param])).double().eval()


@pytest.fixture
def ids():
    return torch.randint(3, 259, (N, B, T), generator=torch.Generator().manual_seed(1))


def said():
    """What may be said of N batches, each of which says something else."""
    mask = torch.ones(N, B, T, dtype=torch.long)
    mask[0, 0, :3] = mask[1, 1, 8:] = 0
    numbered, positions = torch.ones_like(mask), torch.arange(T).expand(N, B, T).clone()
    numbered[2, 0, 4:], positions[1, 0, 6:] = 2, torch.arange(T - 6)
    start = torch.zeros(N, B, T, dtype=torch.bool)
    start[2, 1, 5] = True
    return {
        "nothing": {},
        "mask": {"attention_mask": mask},
        "numbered mask": {"attention_mask": numbered},
        "positions": {"position_ids": positions},
        "positions, mask": {"position_ids": positions, "attention_mask": mask},
        "seq_idx": {"seq_idx": numbered},
        "reset": {"reset": start},
    }


@pytest.mark.parametrize("case", said())
def test_models_under_vmap(model, ids, case):
    """No value is read that vmap hides: every way to say padding and documents, with ids that it batches."""
    given = said()[case]

    def logits(i, values):
        return model(i, use_cache=False, **dict(zip(given, values, strict=True))).logits

    got = vmap(logits)(ids, tuple(given.values()))
    want = [logits(ids[n], [x[n] for x in given.values()]) for n in range(N)]
    torch.testing.assert_close(got, torch.stack(want))


def test_gradients_of_samples(model, ids):
    """To float32: the loss is computed in it."""
    given, params = said()["mask"]["attention_mask"], {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, i, mask):
        return functional_call(model, params, (i,), {"attention_mask": mask, "labels": i, "use_cache": False}).loss

    got = vmap(grad(loss), (None, 0, 0))(params, ids, given)
    for n in range(N):
        for name, want in grad(loss)(params, ids[n], given[n]).items():
            torch.testing.assert_close(got[name][n], want, rtol=1e-5, atol=1e-6)


def test_a_policy_that_looks_at_values_under_vmap():
    layer = df.TestTimeTraining(8, 2, learner=df.learners.Linear(), objective="squared", rule="sgd", chunk=3)
    layer.nan_policy = "raise"
    x = torch.randn(3, 2, 5, 8)
    torch.testing.assert_close(vmap(lambda x: layer(x)[0])(x), torch.stack([layer(y)[0] for y in x]))


@pytest.mark.parametrize("share_qk", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_padding_holds_reaches_no_gradient(share_qk, value):
    torch.manual_seed(0)
    layer = df.TestTimeTraining(
        8, 2, learner=df.learners.Linear(), objective="squared", rule="sgd", chunk=3, use_gate=True, share_qk=share_qk
    ).double()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = mask[1, :2] = False
    x = torch.randn(2, 7, 8, dtype=torch.double)

    def gradients(held):
        given = torch.where(mask[..., None], x, held).requires_grad_()
        y, _ = layer(given, attention_mask=mask)
        return y[mask], torch.autograd.grad(y[mask].square().sum(), [given, *layer.parameters()])

    (y, found), (want_y, want) = gradients(value), gradients(0.5)
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(found, want)


def test_what_padding_embeds_reaches_no_gradient(model, ids):
    mask = said()["mask"]["attention_mask"][1]
    embeds = model.get_input_embeddings()(ids[1]).detach()
    labels = torch.where(mask.bool(), ids[1], -100)
    params = list(model.model.layers.parameters())

    def gradients(held):
        given = torch.where(mask.bool()[..., None], embeds, held)
        out = model(inputs_embeds=given, attention_mask=mask, labels=labels, use_cache=False)
        return torch.autograd.grad(out.loss, params)

    torch.testing.assert_close(gradients(torch.nan), gradients(0.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16])
def test_masks_of_every_type(model, ids, dtype):
    for case in ("mask", "numbered mask"):
        mask = said()[case]["attention_mask"][2 if case == "numbered mask" else 1]
        want = model(ids[0], attention_mask=mask).logits
        torch.testing.assert_close(model(ids[0], attention_mask=mask.to(dtype)).logits, want)
    falls = (3 - said()["numbered mask"]["attention_mask"][2]).to(dtype)
    with pytest.raises(ValueError, match="numbers documents that fall"):
        model(ids[0], attention_mask=falls)


@pytest.mark.parametrize("rows", [[2], [0, -3], torch.tensor([5])])
def test_rows_that_are_not_there(model, ids, rows):
    cache = model(ids[0], use_cache=True).past_key_values
    with pytest.raises(IndexError, match=r"expected numbers of the batch = 2 rows, -2 \.\.\. 1"):
        cache.batch_select_indices(rows)


@pytest.mark.parametrize("masked", [False, True])
def test_models_on_the_meta_device(model, ids, masked):
    """Shapes without values, for who plans memory."""
    given = {"attention_mask": torch.ones_like(ids[0], device="meta")} if masked else {}
    assert model.to("meta")(ids[0].to("meta"), **given).logits.shape == (B, T, 259)
