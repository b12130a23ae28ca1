"""Which weights are masked, which stay dense, and what is said of the others."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import SelectionError, models
from fxsparse.models.zoo import ZOO


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1)])
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 9, 9)
ALL = ["stem.weight", "blocks.0.weight", "blocks.1.weight", "head.weight"]


def masked(**options):
    return list(fxsparse.sparsify(Net(), X, sparsity=0.5, distribution="uniform", verify=False, **options).masks)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"exclude": "first"}, ALL[1:]),
        ({"exclude": ("last",)}, ALL[:3]),
        ({"exclude": ("first", "depthwise")}, ["blocks.1.weight", "head.weight"]),
        ({"exclude": nn.Linear}, ALL[:3]),
        ({"exclude": [nn.Conv2d]}, ["head.weight"]),
        ({"include": ["blocks.*"]}, ALL[1:3]),
        ({"include": "head"}, ["head.weight"]),
        ({"include": ["blocks.*", "head.weight"], "exclude": ["depthwise"]}, ["blocks.1.weight", "head.weight"]),
    ],
)
def test_selectors(options, expected):
    assert masked(**options) == expected


def test_excluded_weights_are_listed_with_the_reason_and_count_in_no_budget():
    sparse = fxsparse.sparsify(Net(), X, sparsity=0.75, distribution="erk", exclude=("first", "depthwise"))
    assert {(item.name, item.reason) for item in sparse.uncovered} == {
        ("stem.weight", "excluded"),
        ("blocks.0.weight", "excluded"),
    }
    # 16 x 8 and 4 x 16 weights: 192, of which 144 are removed, up to one element a site.
    assert 48 <= sum(sparse.active_counts.values()) <= 49
    assert "stem.weight" in sparse.report()


def test_dense_weights_have_a_mask_of_ones_inside_the_budget():
    sparse = fxsparse.sparsify(Net(), X, sparsity=0.5, distribution="erk", dense="head")
    assert bool(sparse.masks["head.weight"].all())
    total = sum(site.numel for site in sparse.sites)
    assert sum(sparse.active_counts.values()) == pytest.approx(total / 2, abs=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "stem.weigt"}, r"exclude: 'stem\.weigt' matches no weight site; did you mean stem\.weight"),
        ({"include": "frist"}, "did you mean first"),
        ({"exclude": nn.Conv3d}, "'Conv3d' matches no weight site"),
        ({"exclude": 7}, "7 is neither a glob"),
        ({"exclude": "*"}, "leave none of the 4 weight sites"),
        ({"exclude": "head", "dense": "head"}, r"dense: head\.weight has no mask \(excluded\)"),
    ],
)
def test_bad_selectors_say_what_is_near(options, message):
    with pytest.raises(SelectionError, match=message):
        masked(**options)


def test_weights_hidden_in_modules_are_listed_and_cannot_be_included():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm((4, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.norm(x))

    sparse = fxsparse.sparsify(Normalised(), torch.randn(5, 4, 6), sparsity=0.5, distribution="er")
    assert list(sparse.masks) == ["head.weight"]
    reasons = {item.name: item.reason for item in sparse.uncovered}
    assert reasons == dict.fromkeys(["norm.weight", "norm.bias"], "of the normalisation LayerNorm norm")
    with pytest.raises(SelectionError, match=r"norm\.weight cannot be masked: of the normalisation LayerNorm norm"):
        fxsparse.sparsify(Normalised(), torch.randn(5, 4, 6), include="norm.*")


class Language(nn.Module):
    """An embedding whose table is also the output layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)).relu())


def test_a_weight_tied_to_an_embedding_is_left_out_by_default_and_masked_in_both_uses_on_request():
    tokens = torch.randint(0, 20, (3, 5))
    sparse = fxsparse.sparsify(Language(), tokens, sparsity=0.5, distribution="er")
    assert list(sparse.masks) == ["body.weight"]
    assert "tied to an embedding" in {item.name: item.reason for item in sparse.uncovered}["embedding.weight"]

    model = Language()
    sparse = fxsparse.sparsify(
        model, tokens, sparsity=0.5, distribution="er", include=["embedding.weight", "body.weight"]
    )
    mask = sparse.masks["embedding.weight"]
    with torch.no_grad():
        model.embedding.weight.mul_(mask)
        model.body.weight.mul_(sparse.masks["body.weight"])
    assert torch.equal(sparse(tokens), model(tokens))
    # Storage aside, both uses read the mask: what stands outside it has no influence.
    with torch.no_grad():
        sparse.get_parameter("embedding.weight")[~mask] = 99.0
    assert torch.equal(sparse(tokens), model(tokens))


def test_frozen_weights_are_left_out_and_listed():
    model = Net()
    model.stem.weight.requires_grad_(False)
    sparse = fxsparse.sparsify(model, X, sparsity=0.5)
    assert "stem.weight" not in sparse.masks
    assert "frozen" in {item.name: item.reason for item in sparse.uncovered}["stem.weight"]


def test_a_model_without_weights_is_refused_with_the_reasons():
    with pytest.raises(SelectionError, match="LayerNorm"):
        fxsparse.sparsify(nn.Sequential(nn.LayerNorm((1, 3))), torch.randn(2, 1, 3))
    with pytest.raises(SelectionError, match="no weight to mask"):
        fxsparse.sparsify(nn.Sequential(nn.ReLU()), torch.randn(2, 3))


def test_the_papers_mobilenet_leaves_first_and_depthwise_out():
    sparse = fxsparse.sparsify(
        models.mobilenet_v1(), torch.randn(1, 3, 32, 32), sparsity=0.75, exclude=("first", "depthwise"), verify=False
    )
    assert len(sparse.sites) == 14  # 13 pointwise convolutions and the classifier
    assert sum(item.reason == "excluded" for item in sparse.uncovered) == 14  # the stem and 13 depthwise ones


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.refused is None])
def test_every_matrix_shaped_parameter_is_masked_or_listed(name):
    torch.manual_seed(0)
    model = ZOO[name].make()
    sparse = fxsparse.sparsify(model, ZOO[name].example(), verify=False, sparsity=0.5, distribution="uniform")
    named = {*sparse.masks, *(item.name for item in sparse.uncovered)}
    assert named == {key for key, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert all(item.reason for item in sparse.uncovered)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("*", ALL),
        (nn.Module, ALL),
        ("blocks.?.weight", ALL[1:3]),
        ((nn.Linear, "first"), [ALL[0], ALL[3]]),
        ("depthwise", ALL[1:2]),
    ],
)
def test_what_a_selector_takes_the_others_leave(selector, expected):
    assert masked(include=selector) == expected
    if expected != ALL:
        assert masked(exclude=selector) == [name for name in ALL if name not in expected]


def test_types_are_those_of_the_module_that_holds_the_weight():
    class OwnConv(nn.Conv2d):
        pass

    model = nn.Sequential(OwnConv(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 25, 3))
    for kind, count in ((OwnConv, 1), (nn.Conv2d, 2), (nn.modules.conv._ConvNd, 2)):
        assert len(fxsparse.sparsify(model, X, include=kind).sites) == count


def test_last_is_the_last_in_eval_mode():
    """An auxiliary head that only training uses is not the last layer."""
    case = ZOO["mode_switch"]
    sparse = fxsparse.sparsify(case.make(), case.example(), include="last")
    assert [site.name for site in sparse.sites] == ["head.weight"]


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight", "head"])
def test_a_tied_weight_goes_by_all_its_names(name):
    sparse = fxsparse.sparsify(Language(), torch.randint(0, 20, (3, 5)), include=[name])
    assert list(sparse.masks) == ["embedding.weight"]


def test_frozen_weights_are_masked_on_request():
    model = Net()
    model.stem.weight.requires_grad_(False)
    assert "stem.weight" in fxsparse.sparsify(model, X, sparsity=0.5, include="*").masks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": "stem", "include": "head"}, r"dense: stem\.weight has no mask \(not in include\)"),
        ({"dense": ["stem", "block.1"]}, r"dense: 'block\.1' matches no weight site; did you mean blocks\.1\.weight"),
        ({"exclude": [torch.Tensor]}, "is neither a glob of weight names nor an nn.Module type"),
    ],
)
def test_more_bad_selectors(options, message):
    with pytest.raises(SelectionError, match=message):
        masked(**options)


def test_a_model_without_sites_says_what_it_has():
    with pytest.raises(SelectionError, match=r"LayerNorm has no weight to mask \(weight: enters by layer_norm"):
        fxsparse.sparsify(nn.LayerNorm((2, 8)), torch.randn(3, 2, 8))
    with pytest.raises(SelectionError, match="no matrix-shaped parameter"):
        fxsparse.sparsify(nn.BatchNorm2d(3), X)
