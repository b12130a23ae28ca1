"""The result of the analysis: as data, JSON, table and picture; what it refuses."""

import shutil

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.core.channel_rules import channel_rule
from fxsparse.models.channel_nets import CHANNEL_NETS, SEQUENCE_NETS, example_of


def groups_of(name):
    torch.manual_seed(0)
    return fxsparse.channel_groups(CHANNEL_NETS[name](), example_of(name))


def test_what_belongs_to_an_atom_of_a_residual_stream():
    groups = groups_of("residual")
    group = groups.group_of("stem.weight")
    assert group.producers == ("stem.weight", "second.weight") and len(group.atoms) == 8
    atom = group.atoms[3]
    assert atom.status == "exact" and atom.reason == ""
    assert {(item.tensor, item.dim, item.indices, item.role) for item in atom.slices} == {
        ("stem.weight", 0, (3,), "producer"),
        ("second.weight", 0, (3,), "producer"),
        ("first.weight", 1, (3,), "consumer"),
        ("head.weight", 1, (3,), "consumer"),
        *((name, 0, (3,), "carrier") for name in ("stem.bias", "second.bias")),
        *((f"norm.{name}", 0, (3,), "carrier") for name in ("weight", "bias", "running_mean", "running_var")),
    }


def test_heads_are_atoms_and_grouped_queries_share_keys():
    group = groups_of("grouped queries").group_of("q.weight")
    assert group.producers == ("q.weight", "k.weight", "v.weight") and len(group.atoms) == 2
    first = {item.tensor: item.indices for item in group.atoms[0].of("producer")}
    assert first["q.weight"] == tuple(range(15)) and first["k.weight"] == first["v.weight"] == tuple(range(5))
    assert group.atoms[0].of("consumer")[0].tensor == "out.weight"


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"batch_first": False}, {"bias": False}])
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_heads_of_attention_modules_are_atoms(options, need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(16, 12)
            self.attention = nn.MultiheadAttention(12, 3, **({"batch_first": True} | options))
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.attention(x, x, x, need_weights=need_weights)[0])

    x = torch.randn(2, 7, 16)
    group = fxsparse.channel_groups(Attention(), x).group_of("attention.in_proj_weight")
    atom = group.atoms[1]
    assert group.status == "exact"
    assert atom.of("producer")[0].indices == (4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31)
    assert {item.tensor: item.indices for item in atom.of("consumer")} == {"attention.out_proj.weight": (4, 5, 6, 7)}
    assert fxsparse.channel_groups(Attention(), x).group_of("stem.weight").status == "exact"


def test_flattened_images_are_consumed_in_blocks():
    atom = groups_of("baked view").group_of("conv.weight").atoms[2]
    assert atom.of("consumer")[0].indices == tuple(range(32, 48))


@pytest.mark.parametrize(
    ("name", "producer", "status", "reason"),
    [
        ("unknown operation", "conv.weight", "pinned", "cdist"),
        ("weight norm", "conv.weight", "pinned", "conv2d"),
        ("residual onto the input", "back.weight", "pinned", "add"),
        ("GroupNorm after cat", "left.weight", "norm-coupled", "norm"),
        ("channel mean", "conv.weight", "norm-coupled", "mean"),
        ("pre-norm", "stem.weight", "norm-coupled", "norm"),
        ("residual", "head.weight", "pinned", "output"),
    ],
)
def test_reasons_name_the_node(name, producer, status, reason):
    group = groups_of(name).group_of(producer)
    assert group.status == status and reason in group.reasons[0]


def test_json_gives_the_same_back():
    groups = groups_of("cat, split, cat")
    assert fxsparse.ChannelGroups.from_json(groups.to_json()) == groups


def test_table_and_picture():
    groups = groups_of("GroupNorm after cat")
    table = groups.table()
    assert "left.weight" in table and "norm-coupled" in table and "3 groups of channels" in table
    dot = groups.dot()
    assert dot.startswith("digraph") and '"left.weight" -> "next.weight"' in dot
    if shutil.which("dot"):
        assert "<svg" in groups.svg()
    else:
        with pytest.raises(fxsparse.ConfigError, match="Graphviz"):
            groups.svg()


def test_the_model_is_not_touched_and_both_modes_count():
    model = CHANNEL_NETS["residual"]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fxsparse.compact(model, example_of("residual"), remove=groups_of("residual").groups[0].atoms[:2])
    assert model.training and all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.main, self.side = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            return (self.main(x), self.side(x)) if self.training else self.main(x)

    group = fxsparse.channel_groups(Auxiliary(), torch.randn(2, 4)).group_of("stem.weight")
    assert {item.tensor for item in group.atoms[0].of("consumer")} == {"main.weight", "side.weight"}


def test_a_sparse_module_has_the_groups_of_its_model():
    torch.manual_seed(0)
    model = CHANNEL_NETS["residual"]()
    sparse = fxsparse.sparsify(model, example_of("residual"), sparsity=0.5)
    assert fxsparse.channel_groups(sparse) == fxsparse.ChannelGroups("Net", groups_of("residual").groups)


def test_only_atoms_of_the_same_model_go_that_can():
    groups, other = groups_of("channel mean"), groups_of("residual")
    model, x = CHANNEL_NETS["channel mean"](), example_of("residual")
    with pytest.raises(fxsparse.SelectionError, match="norm-coupled channel is mixed with others by node mean"):
        fxsparse.compact(model, x, remove=groups.group_of("conv.weight").atoms[:1])
    with pytest.raises(fxsparse.SelectionError, match="pinned"):
        fxsparse.compact(model, x, remove=groups.pinned[0].atoms[:1])
    with pytest.raises(fxsparse.SelectionError, match="this very model"):
        fxsparse.compact(model, x, remove=other.groups[0].atoms[:1])
    with pytest.raises(fxsparse.InputError, match="example_input"):
        fxsparse.channel_groups(model)


def test_a_function_of_the_user_with_the_name_of_ours_is_unknown():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")

    def relu(x):
        return x.flip(1)

    assert channel_rule(nn.Module(), graph.call_function(relu, (x,))) is None
    assert channel_rule(nn.Module(), graph.call_function(torch.relu, (x,))).kind == "elementwise"


def test_the_compact_module_saves_loads_and_exports(tmp_path, tools):
    for name in ("residual", "channel shuffle", "fused attention"):
        model = tools.randomised(CHANNEL_NETS[name](), torch.float32)
        x = example_of(name)
        small = fxsparse.compact(model, x, remove=tools.half_of(fxsparse.channel_groups(model, x))).eval()
        path = tmp_path / "small.pt"
        if name not in SEQUENCE_NETS:
            small.run = None  # a function of the network, which does not pickle by itself here
        torch.save(small.state_dict(), path)
        again = fxsparse.compact(model, x, remove=tools.half_of(fxsparse.channel_groups(model, x))).eval()
        again.load_state_dict(torch.load(path))
        assert torch.equal(again(x), small(x))
        torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_a_small_module_is_pickled_whole(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 36, 4))
    x = torch.randn(2, 3, 8, 8)
    atoms = fxsparse.channel_groups(model, x).groups[0].atoms[:5]
    small = fxsparse.compact(model, x, remove=atoms).eval()
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    assert repr(again.get_submodule("0")).startswith("Conv2d(3, 3, kernel_size")
    assert torch.equal(again(x), small(x))
