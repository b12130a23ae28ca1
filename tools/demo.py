"""The main job on real data, without a download: `make demo`.

scikit-learn's handwritten digits and a small residual network, trained three times for the same number of
steps: dense, with random masks that stay (static), and with masks that RigL rewires. Ends with a table and a
picture (accuracy over steps; density per layer).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from fxsparse.core.errors import ConfigError, FxSparseError
from fxsparse.training import Result, TrainConfig, data, plots, summary, train

METHODS = ("dense", "static", "rigl")
WIDTH = 4  # channels of the first stage: a network that the digits do not let off lightly at 90% sparsity
UPDATE_INTERVAL = 50  # steps between rewirings
MARKER = ".fxsparse-demo"  # lies in every folder that this program may recreate


def main() -> int:
    """Run the demonstration; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of each of the three runs")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the weights that is removed")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, masks and data order")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder, recreated every time")
    arguments = parser.parse_args()
    try:
        demonstrate(arguments.out, arguments.steps, arguments.sparsity, arguments.seed)
    except FxSparseError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; run it again to start over", file=sys.stderr)
        return 130
    return 0


def demonstrate(out: Path, steps: int, sparsity: float, seed: int) -> list[Result]:
    """Train the three networks in subfolders of `out`; print the table, save `comparison.png`."""
    configs = {
        method: TrainConfig(
            method=method,
            sparsity=sparsity,
            data="digits",
            model="small_resnet",
            model_options={"width": WIDTH},
            update_interval=UPDATE_INTERVAL,
            schedule="cosine",
            steps=steps,
            seed=seed,
            threads=1,  # so small a network gains nothing from a second one
            tensorboard=False,
            plots=False,
        )
        for method in METHODS
    }
    digits = data.load("digits")
    recreate(out)
    print(f"scikit-learn's digits, a small residual network, trained in {len(METHODS)} ways for {steps} steps each\n")
    results = []
    for method, config in configs.items():
        results.append(train(config, out / method, say=lambda line: None))
    print("\n" + summary.comparison(results))
    rigl = results[-1]
    print(
        f"\nRigL rewired the masks {rigl.rewirings} times, "
        f"{rigl.changed_per_rewiring:.0f} of {rigl.active_weights} connections a time."
    )
    images = len(digits.test)
    print(f"One seed and {images} test images: one image more or less is {1 / images:.4f} of accuracy.")
    print(plots.draw_or_explain([result.run_folder for result in results], out / "comparison.png"))
    return results


def recreate(folder: Path) -> None:
    """An empty `folder`; `ConfigError` if what is there is not an earlier demonstration."""
    if folder.exists() and not (folder / MARKER).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not a folder of this demonstration; choose another --out")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
    except OSError as error:
        raise ConfigError(f"could not write to {folder}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
