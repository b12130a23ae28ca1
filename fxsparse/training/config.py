"""Every option of a training run, its default and what it may be.

`TrainConfig` is the one place where an option is named: the command line, the checks, `config.json` and the
check for contradicting flags on `--resume` all read its fields. An option that depends on the data set is
None here; `resolved()` fills it in from `recipes.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fxsparse.core.errors import ConfigError, nearest
from fxsparse.core.granularity import read_granularity
from fxsparse.lowering import check_trains_lowered
from fxsparse.runtime.granularity import check_goal, check_granularity
from fxsparse.runtime.semantics import make_semantics
from fxsparse.training.execution import COMPILE_MODES, canonical_compile_mode
from fxsparse.training.options import Option, check_choice, option, options_of
from fxsparse.training.recipes import recipe_for


def method_names() -> list[str]:
    """The methods that `sparsify` knows."""
    import fxsparse

    return list(fxsparse.methods())


def distribution_names() -> list[str]:
    """The distributions of sparsity over layers that `allocate` knows."""
    from fxsparse.core.allocation import DISTRIBUTIONS

    return list(DISTRIBUTIONS)


def decay_names() -> list[str]:
    """The decays of the drop fraction that the update schedule knows."""
    from fxsparse.runtime.schedule import DECAYS

    return list(DECAYS)


def redistribution_names() -> list[str]:
    """By what a method can move connections between layers."""
    from fxsparse.runtime.redistribution import REDISTRIBUTIONS

    return list(REDISTRIBUTIONS)


def canonical_granularity(given: Any) -> str:
    """`(4, 1)` is `4x1`."""
    return str(read_granularity(given))


def semantics_names() -> list[str]:
    """The presets of choices on which published implementations differ."""
    from fxsparse.runtime.semantics import PRESETS

    return list(PRESETS)


def place_names() -> list[str]:
    """Where a set of images can lie."""
    from fxsparse.training.data.placement import PLACES

    return list(PLACES)


def model_names() -> list[str]:
    """The networks that `fxsparse.models.build` knows."""
    import fxsparse.models as models

    return list(models.names())


def canonical_model(name: str) -> str:
    """`char-gru` is `char_gru`."""
    import fxsparse.models as models

    return models.canonical(name)


# What has no meaning for the other kind of data, and is refused there.
IMAGE_OPTIONS = ("image_size", "train_images", "validation", "split_seed", "flip", "crop", "channels_last")
TEXT_OPTIONS = ("sequence_length", "split")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of one run; a wrong value raises `ConfigError` when the object is made.

    Lengths are in optimizer steps unless they say epochs; fractions are shares of the whole run.
    """

    # what to train
    model: str | None = option(
        None, "network: one of models/, or a torchvision classification model", canonical=canonical_model
    )
    model_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "keyword arguments of the network, as KEY=VALUE"}
    )
    data: str = option("digits", "data set: digits, cifar10, cifar100, fashion-mnist, imagefolder:PATH, text:PATH")
    data_root: str = option("data", "folder that holds the data sets", changeable=True)
    image_size: int | None = option(None, "side of the images in pixels, of an imagefolder", within="[1, inf)")
    train_images: int | None = option(
        None, "training images to use, drawn class by class; by default all that are not held out", within="[1, inf)"
    )
    validation: int = option(0, "training images held out (the report: 5000)", within="[0, inf)")
    split_seed: int = option(0, "seed that draws them", within="[0, inf)")
    sequence_length: int | None = option(None, "characters of a text in a sequence", within="[1, inf)")
    split: tuple[float, ...] | None = option(
        None, "shares of a text to train on, to watch and to test on, in its order", within="[0, 1]"
    )

    # sparsity
    method: str = option("rigl", "how the masks come about", choices=method_names)
    granularity: str = option(
        "weight",
        "what is dropped and grown as one: weight, channel, or 4x1: the weights of 4 output channels at one input "
        "position; 2:4: single weights, 2 of every 4 along the input dimension, which fixes the sparsity",
        canonical=canonical_granularity,
        spellings=True,
    )
    compact: bool = option(
        False, "of channels: train with those that are active only, at the compact size", changeable=True
    )
    lower: bool = option(False, "train on active weights alone: sparse kernels where they are faster", changeable=True)
    pack_masks: bool = option(False, "store masks as bits, an eighth of the memory", changeable=True)
    sparsity: float | None = option(
        None, "share of the weights that is removed, where flops is not given", within="[0, 1)"
    )
    flops: float | None = option(None, "in place of sparsity: forward cost over the dense one", within="(0, 1]")
    distribution: str = option("erk", "how sparsity is spread over the layers", choices=distribution_names)
    drop_fraction: float | None = option(None, "share of the weights dropped at the first rewiring", within="[0, 1]")
    update_interval: int | None = option(None, "steps between rewirings", within="[1, inf)")
    stop_fraction: float | None = option(None, "share of the run after which masks stay", within="[0, 1]")
    decay: str = option("cosine", "how the drop fraction falls over the run", choices=decay_names)
    decay_power: float = option(3.0, "exponent of decay inverse_power", within="[0, inf)")
    redistribution: str | None = option(
        None, "by what connections move between layers; by default the method's own way", choices=redistribution_names
    )
    method_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the method, as KEY=VALUE: scope=global, momentum=optimizer"}
    )
    semantics: str = option("paper", "whose choices where published codes differ", choices=semantics_names)
    semantics_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "single choices over it, as KEY=VALUE: rounding=ceil"}
    )
    masks_from: str | None = option(
        None, "begin with the final masks of the run in this folder; its densities then hold, not sparsity"
    )
    densities_from: str | None = option(None, "begin with random masks of that run's final densities")
    weights_from: str | None = option(None, "begin with that run's weights; a lottery ticket: those of masks_from")
    rewind: int | None = option(
        None,
        "step whose weights they are; by default 0 of a lottery ticket's masks_from, else the last",
        within="[0, inf)",
    )
    include: tuple[str, ...] | None = option(None, "mask only these weights: names, globs, first, last, depthwise")
    exclude: tuple[str, ...] = option((), "leave these weights unmasked and out of the budget")
    dense: tuple[str, ...] = option((), "keep these weights dense inside the budget")
    verify: bool = option(True, "check the rewritten graph against the eager model first")

    # optimisation
    epochs: int | None = option(None, "length in passes over the training set", within="[1, inf)")
    steps: int | None = option(None, "length in optimizer steps, instead of epochs", within="[1, inf)")
    extend: float = option(
        1.0, "stretch length, learning-rate milestones and rewiring by this factor", within="[1, inf)"
    )
    batch_size: int | None = option(None, "images or sequences a step", within="[1, inf)")
    optimizer: str | None = option(None, "optimizer", choices=("sgd", "adam", "adamw"))
    lr: float | None = option(None, "learning rate", within="[0, inf)")
    momentum: float = option(0.9, "momentum of sgd", within="[0, 1)")
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float | None = option(None, "weight decay", within="[0, inf)")
    schedule: str | None = option(None, "learning-rate schedule", choices=("step", "cosine", "constant"))
    milestones: tuple[float, ...] = option(
        (0.3072, 0.6144, 0.9216),  # steps 30,000, 60,000 and 90,000 of the report's 97,656
        "where schedule step lowers the rate: shares of the run (below 1) or steps",
        within="(0, inf)",
    )
    gamma: float = option(0.2, "factor at each milestone", within="(0, 1]")
    warmup_steps: int = option(0, "steps of linear learning-rate warm-up", within="[0, inf)")
    clip_norm: float | None = option(
        None, "limit of the norm of all gradients together, beyond which they are scaled down", within="(0, inf)"
    )
    label_smoothing: float = option(0.0, "label smoothing", within="[0, 1)")
    flip: bool | None = option(None, "mirror training images at random")
    crop: int | None = option(None, "pad by so many pixels and crop at random", within="[0, inf)")

    # execution
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", changeable=True)
    amp: str = option("none", "automatic mixed precision", choices=("none", "bf16", "fp16"))
    compile: str = option(
        "none",
        "train through torch.compile, in this mode; reduce-overhead records CUDA graphs",
        choices=COMPILE_MODES,
        canonical=canonical_compile_mode,
        spellings=True,
        alone="default",
    )
    channels_last: bool = option(False, "weights and images in channels_last memory format")
    fused: bool | None = option(None, "one optimizer kernel for all weights; by default on a CUDA device")
    threads: int | None = option(
        None,
        "CPU threads of torch; another number can change the last bits",
        within="[1, inf)",
        changeable=True,
    )
    workers: int | None = option(None, "processes that read images", within="[0, inf)", changeable=True)
    data_device: str = option(
        "auto",
        "where a set of images lies: auto is the training device, where it fits there",
        choices=place_names,
        changeable=True,
    )
    seed: int = option(0, "seed of weights, masks and data order", within="[0, inf)")

    # records
    log_interval: int = option(20, "steps between training records and NaN checks", within="[1, inf)")
    eval_interval: int | None = option(
        None,
        "steps between evaluations; by default an epoch or a 50th of the run, the longer",
        within="[1, inf)",
    )
    eval_batch_size: int = option(500, "images of an evaluation that go through the network at once", within="[1, inf)")
    checkpoint_interval: int | None = option(
        None, "steps between checkpoints; by default as evaluations", within="[1, inf)", changeable=True
    )
    keep_checkpoints: int = option(1, "newest checkpoints kept; 0 keeps all", within="[0, inf)", changeable=True)
    keep_steps: tuple[int, ...] | None = option(
        None, "steps whose weights are kept for good, 0 for the first ones; of pruning always", within="[0, inf)"
    )
    tensorboard: bool = option(True, "write TensorBoard events where it is installed", changeable=True)
    plots: bool = option(True, "draw pictures where matplotlib is installed", changeable=True)

    def __post_init__(self) -> None:
        for name, entry in config_options().items():
            object.__setattr__(self, name, entry.check(getattr(self, name)))
        self._check_names()
        self._check_combinations()

    def _check_names(self) -> None:
        from fxsparse.training import data

        check_choice("data set", self.data.partition(":")[0], [name.partition(":")[0] for name in data.names()])
        if self.model is not None:
            check_choice("model", self.model, model_names())
        self._check_kind()

    def _check_kind(self) -> None:
        """Images and texts have networks and options of their own."""
        import fxsparse.models as models
        from fxsparse.training import data

        kinds = ("images", "text")
        is_text = data.is_text(self.data)
        if self.model is not None and models.takes_text(self.model) != is_text:
            raise ConfigError(f"{self.model} takes {kinds[not is_text]}, and {self.data} is {kinds[is_text]}")
        for name in IMAGE_OPTIONS if is_text else TEXT_OPTIONS:
            if getattr(self, name):
                raise ConfigError(
                    f"{name} is {shown(getattr(self, name))}; it is for {kinds[not is_text]}, and {self.data} is "
                    f"{kinds[is_text]}"
                )
        if self.split is not None:
            data.check_shares(self.split)

    def _check_combinations(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(f"epochs is {self.epochs} and steps is {self.steps}; give one of the two")
        if self.sparsity is not None and self.flops is not None:
            raise ConfigError(f"sparsity is {self.sparsity} and flops is {self.flops}; give one of the two")
        inherits = [name for name in ("masks_from", "densities_from") if getattr(self, name) is not None]
        for name in inherits:
            if self.method in ("dense", "small-dense"):
                raise ConfigError(f"{name} is given, and method {self.method} is dense; leave it out")
            if self.flops is not None or self.dense:
                other = "flops" if self.flops is not None else "dense"
                raise ConfigError(f"{name} brings its densities along; leave {other} out")
        if len(inherits) == 2:
            raise ConfigError("masks_from and densities_from are given; give one of the two")
        if self.method == "lottery" and self.masks_from is None:
            raise ConfigError("method lottery needs masks_from, the folder of a finished pruning run")
        if self.rewind is not None and self.weights_from is None and self.method != "lottery":
            raise ConfigError(f"rewind is {self.rewind}, and there is no run to rewind to; give weights_from")
        self._check_method()
        if self.nesterov and (self.optimizer not in (None, "sgd") or self.momentum == 0):
            raise ConfigError("nesterov needs optimizer sgd with a momentum above 0")
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ConfigError(f"milestones is {shown(self.milestones)}; they must rise")
        if any(milestone > 1 and not milestone.is_integer() for milestone in self.milestones):
            raise ConfigError(f"milestones is {shown(self.milestones)}; above 1 they are whole steps")

    def _check_method(self) -> None:
        from fxsparse.runtime.methods import make_method

        semantics = make_semantics(self.semantics_mapping)
        options = dict(self.method_options)
        if self.redistribution is not None and "redistribution" in options:
            raise ConfigError("redistribution is given twice, by itself and in method_options; give one of the two")
        if self.redistribution is not None:
            options["redistribution"] = self.redistribution
        method = make_method(self.method, self.semantics, **options)
        granularity = check_granularity(method, self.granularity, semantics)
        check_goal(granularity, sparsity=self.sparsity, flops=self.flops, distribution=self.distribution)
        if self.compact and granularity.kind != "channel":
            raise ConfigError("compact is for granularity channel; single weights cannot be cut out")
        if self.pack_masks and granularity.kind == "channel":
            raise ConfigError("pack_masks is for single weights, blocks and N:M; leave it out with channels")
        if self.lower:
            if granularity.kind == "channel":
                raise ConfigError("lower is for single weights and blocks; channels are cut out: compact")
            check_trains_lowered(method, semantics, None)
        if self.densities_from is not None and granularity.kind in ("channel", "n:m"):
            of_what = "channels" if granularity.kind == "channel" else f"granularity {granularity}"
            raise ConfigError(f"densities_from is for single weights; of {of_what}, take masks_from")

    @property
    def semantics_mapping(self) -> dict[str, Any]:
        """The preset and the single choices over it, as `sparsify` takes them."""
        return {"preset": self.semantics, **self.semantics_options}

    def resolved(self) -> TrainConfig:
        """The same with every option that depends on the data set filled in from its recipe."""
        recipe = recipe_for(self.data, self.optimizer)
        missing = {name: value for name, value in recipe.items() if getattr(self, name) is None}
        if self.steps is not None:
            missing.pop("epochs", None)
        if self.flops is not None:
            missing.pop("sparsity", None)
        fixed = check_goal(read_granularity(self.granularity))
        if fixed is not None:
            missing["sparsity"] = fixed
        kept = {*(self.keep_steps or ()), *((0,) if self.method == "pruning" else ())}
        missing["keep_steps"] = tuple(sorted(kept))
        return dataclasses.replace(self, **missing)

    def to_json(self) -> str:
        """The configuration as JSON, for `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """What `to_json` wrote; `ConfigError` if it is not a configuration."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"the configuration is not a JSON object: {text[:60]!r}")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """A configuration from plain values; an unknown option raises `ConfigError`."""
        for name in values:
            if name not in config_options():
                raise ConfigError(f"there is no option {name!r}{nearest(name, config_options())}")
        return cls(**values)

    def changed_by(self, given: dict[str, Any]) -> TrainConfig:
        """This configuration with the options `given` to a resumed run.

        Raises `ConfigError` if one of them would change the result: such a run is another run.
        """
        for name, value in given.items():
            entry, before = config_options()[name], getattr(self, name)
            if entry.check(value) != before and not entry.changeable:
                raise ConfigError(
                    f"{entry.flag} {shown(value)} contradicts the run to resume, which has {shown(before)}"
                )
        return dataclasses.replace(self, **given)


@functools.cache
def config_options() -> dict[str, Option]:
    """The options of `TrainConfig`, by name and in order."""
    return options_of(TrainConfig)


# The headings of `--help`, each beside the first option that stands under it.
HEADINGS = {
    "model": "what to train",
    "method": "sparsity",
    "epochs": "optimisation",
    "device": "execution",
    "log_interval": "records",
}


def shown(value: Any) -> str:
    """An option's value as a person writes it."""
    return " ".join(str(each) for each in value) if isinstance(value, (tuple, list)) else str(value)
