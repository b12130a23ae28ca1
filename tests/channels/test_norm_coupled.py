"""Channels that norms mix: removed exactly, with the original width in the statistics, or refused with the reason."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxsparse
from fxsparse.models.channel_nets import CHANNEL_NETS, example_of

WIDTH = 12


class Stream(nn.Module):
    """A residual stream of `(N, T, 12)` with a class token, positions, two branches and a norm of the given kind."""

    def __init__(self, norm, after=False, middle=None):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 8, WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.first, self.last = norm(), norm()
        self.head = nn.Linear(WIDTH, 3)
        self.after, self.middle = after, middle

    def forward(self, x):
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.stem(x)), 1) + self.positions
        if self.middle is not None:
            x = self.middle(x)
        if self.after:
            x = self.first(x + self.down(F.gelu(self.up(x))))
        else:
            x = x + self.scale * self.down(F.gelu(self.up(self.first(x))))
        return self.head(self.last(x)[:, 0])


class Functional(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        if self.kind == "rms":
            return F.rms_norm(x, (WIDTH,), self.weight)
        return F.layer_norm(x, (WIDTH,), self.weight, bias=self.bias, eps=1e-3)


class Images(nn.Module):
    """A residual stream of images, and a GroupNorm, or a LayerNorm over channels and positions."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.head = norm, nn.Conv2d(WIDTH, 4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.branch(self.norm(x).relu()))


SEQUENCES = {
    "LayerNorm": lambda: Stream(lambda: nn.LayerNorm(WIDTH)),
    "LayerNorm without bias": lambda: Stream(lambda: nn.LayerNorm(WIDTH, bias=False)),
    "RMSNorm": lambda: Stream(lambda: nn.RMSNorm(WIDTH)),
    "after the branch": lambda: Stream(lambda: nn.LayerNorm(WIDTH), after=True),
    "functional LayerNorm": lambda: Stream(lambda: Functional("layer"), after=True),
    "functional RMSNorm": lambda: Stream(lambda: Functional("rms")),
    "dropout and relu": lambda: Stream(lambda: nn.LayerNorm(WIDTH), middle=nn.Sequential(nn.ReLU(), nn.Dropout(0.0))),
    "plain RMSNorm after the branch": lambda: Stream(lambda: nn.RMSNorm(WIDTH, elementwise_affine=False), after=True),
}
IMAGES = {
    "GroupNorm": lambda: Images(nn.GroupNorm(3, WIDTH)),
    "GroupNorm of one group": lambda: Images(nn.GroupNorm(1, WIDTH)),
    "GroupNorm without affine": lambda: Images(nn.GroupNorm(4, WIDTH, affine=False)),
    "LayerNorm of images": lambda: Images(nn.LayerNorm((WIDTH, 8, 8))),
}


def made(name, tools):
    """`(model, function from a batch size to an input)`."""
    torch.manual_seed(0)
    model = {**SEQUENCES, **IMAGES, **CHANNEL_NETS}[name]()
    if name in CHANNEL_NETS:
        return tools.randomised(model), lambda batch: example_of(name, batch, seed=batch).double()
    shape = (7, 5) if name in SEQUENCES else (3, 8, 8)
    return tools.randomised(model), lambda batch: torch.randn(batch, *shape, dtype=torch.float64)


def some_of(groups, fraction=0.5):
    """A random part of all atoms that are not pinned; never a whole group."""
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for group in groups.groups:
        atoms = [atom for atom in group.atoms if atom.status != "pinned"]
        count = min(int(len(atoms) * fraction), len(group.atoms) - 1)
        chosen += [atoms[index] for index in torch.randperm(len(atoms), generator=generator)[:count].tolist()]
    assert any(atom.status == "norm-coupled" for atom in chosen)
    return chosen


NETS = [*SEQUENCES, *IMAGES, "pre-norm", "GroupNorm after cat", "image tokens"]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_what_is_removed_equals_what_is_masked(name, fraction, tools):
    model, example = made(name, tools)
    atoms = some_of(fxsparse.channel_groups(model, example(2)), fraction)
    small = fxsparse.compact(model, example(2), remove=atoms)
    assert not small.notes and list(small.state_dict()) == list(model.state_dict())
    first = next(atom for atom in atoms if atom.status == "norm-coupled").slices[0].tensor
    assert small.get_parameter(first).numel() < model.get_parameter(first).numel()
    reference = tools.masked(model, atoms)
    plain = pickle.loads(pickle.dumps(small)) if name in ("LayerNorm", "GroupNorm") else small
    for training in (False, True):
        for batch in (1, 2, 7):
            x = example(batch)
            expected = tools.outputs(reference, x, training)
            tools.assert_close(expected, tools.outputs(small, x, training), 1e-10)
            tools.assert_close(expected, tools.outputs(plain, x, training), 1e-10)
    again = fxsparse.compact(small)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert all(map(torch.equal, tools.outputs(again, x), tools.outputs(small, x)))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "after the branch", "GroupNorm"])
def test_training_goes_on_alike(name, tools):
    """After ten steps of SGD with momentum and weight decay, with everything of the atoms masked in the large one."""
    model, example = made(name, tools)
    atoms = some_of(fxsparse.channel_groups(model, example(2)))
    small, large = fxsparse.compact(model, example(2), remove=atoms).train(), tools.masked(model, atoms).train()
    ones = copy.deepcopy(model)
    for parameter in ones.parameters():
        nn.init.ones_(parameter)
    masks = tools.masked(ones, atoms)
    inputs = [example(4) for _ in range(10)]
    for module in (small, large):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for x in inputs:
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is large:
                for parameter, mask in zip(large.parameters(), masks.parameters(), strict=True):
                    if parameter.grad is not None:
                        parameter.grad *= mask
            optimizer.step()
    x = example(3)
    tools.assert_close(tools.outputs(large, x), tools.outputs(small, x), 1e-9)


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (nn.Sigmoid(), "not 0 at node first"),
        (nn.Softmax(-1), "mixed with others by node middle"),
        (nn.Hardtanh(0.5, 1.0), "not 0 at node first"),
    ],
)
def test_what_is_not_zero_before_a_norm_is_refused(middle, why, tools):
    model = tools.randomised(Stream(lambda: nn.LayerNorm(WIDTH), middle=middle))
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    group = fxsparse.channel_groups(model, x).group_of("stem.weight")
    assert group.status == "norm-coupled"
    with pytest.raises(fxsparse.SelectionError, match=why):
        fxsparse.compact(model, x, remove=group.atoms[:3])


def test_shifts_and_norms_without_weights_are_refused(tools):
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    models = [
        Stream(lambda: nn.LayerNorm(WIDTH), middle=_Plus()),
        Stream(lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), after=True),  # (0 - mean) / deviation is not 0
    ]
    for model in models:
        group = fxsparse.channel_groups(tools.randomised(model), x).group_of("stem.weight")
        with pytest.raises(fxsparse.SelectionError, match="are not 0 at node"):
            fxsparse.compact(model, x, remove=group.atoms[:3])


class _Plus(nn.Module):
    def forward(self, x):
        return x + 1.0


def test_export_and_onnx(tools, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name in ("LayerNorm", "GroupNorm"):
        model, example = made(name, tools)
        model.float()
        atoms = some_of(fxsparse.channel_groups(model, example(2).float()))
        small = fxsparse.compact(model, example(2).float(), remove=atoms).eval().graph_module()
        shapes = ({0: torch.export.Dim("batch")},)
        x = example(5).float()
        torch.testing.assert_close(torch.export.export(small, (x,), dynamic_shapes=shapes).module()(x), small(x))
        program = torch.onnx.export(small, (example(2).float(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
        program.save(tmp_path / "small.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        tools.assert_close([small(x).detach()], [torch.from_numpy(found)], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("vit_b_32", 64), ("swin_t", 64), ("swin_v2_t", 64), ("convnext_tiny", 64)])
def test_residual_streams_of_torchvision(name, size, tools):
    torch.manual_seed(0)
    options = {"image_size": size} if name.startswith("vit") else {}
    model = tools.randomised(torchvision.models.get_model(name, weights=None, **options))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    atoms = some_of(fxsparse.channel_groups(model, x))
    small = fxsparse.compact(model, x, remove=atoms)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (model, small)]
    assert not small.notes and sizes[1] < 0.3 * sizes[0]
    reference = tools.masked(model, atoms)
    for training in (False, True):
        x = torch.randn(3, 3, size, size, dtype=torch.float64)
        tools.assert_close(tools.outputs(reference, x, training), tools.outputs(small, x, training), 1e-10)
