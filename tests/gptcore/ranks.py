"""What the scripts of tests that run in several ranks share."""

from pathlib import Path

from gptcore.dataset import read_dataset
from gptcore.dist import start
from gptcore.plan import resolve
from gptcore.rundir import RunDir, datasets_root
from gptcore.setup import build
from gptcore.spec import TrainSpec, read_spec
from gptcore.train import Trainer


def build_trainer(folder: Path) -> Trainer:
    """Return this rank's trainer of the run in `folder`, on the dataset "small"; the ranks have joined."""
    run = RunDir(folder)
    spec = read_spec(run.spec)
    dataset = read_dataset(datasets_root(), "small")
    assert isinstance(spec, TrainSpec) and dataset is not None
    dist = start("cpu", 1)
    return build(resolve(spec, datasets_root()), dataset, dist, run, run.attempt(1), lambda event: None)
