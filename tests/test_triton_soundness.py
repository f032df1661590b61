"""Texts of Triton kernels are played through: shapes, definitions, addresses; broken ones are caught, whatever runs them."""

import re
from types import SimpleNamespace

import pytest
import torch
from test_laws import built_in, of, rules
from test_triton import heads, shifted, squared

import dualform as df
from dualform.kernels import triton_launch
from dualform.kernels.soundness import BrokenSchedule
from dualform.kernels.triton_soundness import verify


def played(monkeypatch, program, dim, time, slices, batch=2, num_heads=2, **more):
    """Play every kernel of a call, both ways, and run none; returns their launches."""
    launches = []
    monkeypatch.setattr(triton_launch, "is_on", lambda: True)  # as under DUALFORM_VERIFY=1, of kernels alone
    monkeypatch.setattr(triton_launch, "first_run", lambda *words: launches.append(words) or (None, 1))
    x = [torch.zeros(batch, time, num_heads, dim).requires_grad_() for _ in range(3)]
    o, _ = program(*x, backend=("triton", {"slices": slices}), **more)
    o.sum().backward()
    return launches


cases = [
    (learner, list(rules)[n % len(rules)], (squared, shifted)[n % 2], bool(n % 2)) for n, learner in enumerate(built_in)
]


@pytest.mark.parametrize("n", range(len(cases)))
def test_every_kernel_is_sound(monkeypatch, n):
    """Ragged, with states computed again; one at a size of which only ends are played."""
    learner, rule, objective, slices = cases[n]
    program = of(learner, objective, rule, 4, 20).float()
    launches = played(monkeypatch, program, 20, 10, slices, remat=2)
    assert {words[1].partition("_")[0] for words in launches} >= {"forward", "reverse"}
    if n == 6:
        played(monkeypatch, program, 20, 200, not slices, batch=3)


def test_heads_are_sound(monkeypatch):
    """And the graphs that they are written of: a view stays one where its value no longer lies in order."""
    monkeypatch.setenv("DUALFORM_VERIFY", "1")
    for n, options in enumerate(heads):
        torch.manual_seed(0)
        program = df.derive(df.learners.Head(**options)(4), rule=df.rules.SGD(lr=0.05), chunk=2)
        played(monkeypatch, program, 4, 5, n == 2)


def given_to(monkeypatch, name):
    program = of(built_in[6], shifted, "averaged", 4, 20).float()
    launches = played(monkeypatch, program, 20, 10, True)
    return next(words for words in launches if words[1] == name)[:-1]


faults = [
    ("forward_loop", r" \+ m \* (\w+)_sn", r" + (m + 1) * \1_sn", "is (read|written) at .* expected one of its entries"),
    ("forward_loop", r"\(i32\[None, :\] < 20\)", "(i32[None, :] < 21)", "expected one of its entries|twice"),
    ("reverse_loop", r"i16\[:, None\]", "i32[:, None]", "meet; expected|is multiplied with|is written over"),
    ("reverse_loop", r"(?m)^( +)(\w+) = tl\.dot\(.*$", r"\1pass", "is not defined|referenced before|cannot access"),
    ("forward_loop", r"tl\.minimum\(first \+ group, count\)", "count + 1", "expected one of its entries"),
    ("forward_loop", r"(?m)^( +)(th_\w+) = (\w+)$", r"\1\2 = tl.sum(\3, 0)", "is carried on as|runs over"),
    ("forward_loop", r"tl\.dot\((\w+)", r"tl.dot(tl.permute(\1, [1, 0])", "is multiplied with"),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(faults)))
def test_a_broken_text_is_caught(monkeypatch, n):
    name, pattern, other, says = faults[n]
    text, *rest = given_to(monkeypatch, name)
    verify(text, *rest)
    broken, count = re.subn(pattern, other, text, count=1)
    assert count
    with pytest.raises(BrokenSchedule, match=f"^triton: .*({says})"):
        verify(broken, *rest)


def test_what_is_not_written_is_caught(monkeypatch):
    """An entry, or a mini-batch of one program."""
    text, *rest = given_to(monkeypatch, "forward_after")
    for pattern, other in (
        (r"\(i32\[None, :\] < 20\)", "(i32[None, :] < 19)"),
        ("first, last", "first + 1, last"),
    ):
        broken, count = re.subn(pattern, other, text)
        assert count
        with pytest.raises(BrokenSchedule, match="is not written whole"):
            verify(broken, *rest)


def test_two_programs_that_write_one_place_are_caught(monkeypatch):
    text, *rest = given_to(monkeypatch, "reverse_after")
    broken = re.sub(r"_row \+ part \* (\w+)_sn", r"_row", text)
    assert broken != text
    with pytest.raises(BrokenSchedule, match="is written twice at one place"):
        verify(broken, *rest)


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_a_program_that_reads_where_another_writes_is_caught(monkeypatch, shift):
    """A state may be written over by its own program: not by the one of the next row, nor of the one before."""
    program = of(built_in[6], shifted, "averaged", 4, 20).float()
    state = program(*(torch.zeros(2, 4, 2, 20) for _ in range(3)), backend="eager")[1]
    launches = played(monkeypatch, program, 20, 8, True, state=state)
    text, name, places, *rest = next(words for words in launches if words[1] == "forward_loop")[:-1]
    given = re.search(rf"(?<=def {name}\()[^)]*", text)[0].split(", ")
    before, after = (given.index(f"th_inner_W1_{x}_p") for x in ("before", "after"))
    _, B, H, *own = places[before].shape
    room = torch.zeros(1, B + 2, H, *own)
    found = [*places]
    found[before], found[after] = room[:, 1 : B + 1], room[:, 1 + shift : B + 1 + shift]
    if not shift:
        verify(text, name, found, *rest)
        return
    with pytest.raises(BrokenSchedule, match="is read by one program where another writes"):
        verify(text, name, found, *rest)


def test_entries_that_lie_far_apart_are_counted_in_64_bits(monkeypatch):
    """A token's place in its mini-batch times the tokens' stride, and a start inside an entry."""
    sharing, texts = triton_launch.sharing, {}

    def both(kernel, alike, far):
        texts[kernel.name] = [sharing(kernel, alike, wide) for wide in (False, True)]
        return texts[kernel.name][0]

    monkeypatch.setattr(triton_launch, "sharing", both)
    _, name, places, *rest = given_to(monkeypatch, "forward_loop")
    far = [
        torch.empty_strided(x.shape, [s << 28 for s in x.stride()], device="meta") if isinstance(x, torch.Tensor) else x << 28
        for x in places
    ]  # fmt: skip
    with pytest.raises(BrokenSchedule, match=r"an integer of 32 bits is .* expected one"):
        verify(texts[name][0], name, far, *rest)
    verify(texts[name][1], name, far, *rest)


# -- the assembler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ptxas", "blackwell", "chosen", "says"),
    [("12.8", "12.9", "b", ""), ("12.9", "13.0", "", ""), ("13.0", None, "", ""), ("12.8", "12.8", "", "its ptxas is 12.8; expected >= 12.9")],
)  # fmt: skip
def test_an_assembler_that_is_wrong_on_hopper_is_not_taken(monkeypatch, ptxas, blackwell, chosen, says):
    tools = {"ptxas": SimpleNamespace(version=ptxas, path="a")}
    if blackwell:
        tools["ptxas_blackwell"] = SimpleNamespace(version=blackwell, path="b")
    fake = SimpleNamespace(__version__="3.6.0", knobs=SimpleNamespace(nvidia=SimpleNamespace(**tools)))
    monkeypatch.setattr(triton_launch, "triton_module", lambda: fake)
    monkeypatch.setattr(triton_launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for cached in (triton_launch._newer, triton_launch.lack):
        cached.cache_clear()
    assert triton_launch._newer() == chosen
    said = triton_launch.lack(torch.device("cuda"))
    assert said.startswith(says) if says else not said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    triton_launch.lack.cache_clear()
    assert not triton_launch.lack(torch.device("cuda"))
    for cached in (triton_launch._newer, triton_launch.lack):
        cached.cache_clear()
