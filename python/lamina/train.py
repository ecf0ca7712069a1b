"""Trains the small models, so that accuracy is measured on models that have something to lose: classifiers on MNIST,
and Seq2Seq on dates.

A recipe per model, AdamW under a one-cycle learning rate, random affine augmentation of images, and the weights of the
epoch that did best on the validation part. The same seed on the same machine and thread count gives the same weights.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from lamina import data, models

# Large enough to keep the cores busy, small enough to stay in the cache.
_EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Recipe:
    """
    epochs: passes over the training images; the learning rate's cycle spans them.
    batch_size: images per step.
    learning_rate: at the top of the cycle.
    weight_decay: AdamW's; biases, norms and position embeddings are left out.
    label_smoothing: share of the target spread over all classes.
    clip_norm: gradients longer than this are shortened to it; recurrent layers need it.
    patience: stop after this many epochs without a lower validation loss.
    augment: whether training images are moved, turned and resized at random.
    """

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    label_smoothing: float = 0.05
    clip_norm: float = 1.0
    patience: int = 20
    augment: bool = True


RECIPES = {
    "mlp": Recipe(),
    "lenet": Recipe(epochs=60),
    "cnn": Recipe(epochs=20),
    "lstm": Recipe(epochs=50, learning_rate=5e-3),
    "gru": Recipe(learning_rate=5e-3),
    "seq2seq_dates": Recipe(epochs=12, learning_rate=4e-3, label_smoothing=0.0, patience=4),
    "vit_mnist": Recipe(epochs=22, learning_rate=1.5e-3),
}


@dataclass(frozen=True)
class Metrics:
    """Shares between 0 and 1; recall and f1 are means over the classes (macro).

    Of sequences, accuracy is the share of those that match exactly; recall and f1 are of their tokens.
    """

    accuracy: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Epoch:
    """One line of the history: mean training loss, then loss and accuracy on the validation images.

    The best epoch is the one with the lowest validation_loss: accuracy on 500 images moves in steps of 0.2% and would
    choose by luck.
    """

    loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    name, seed: what was asked for.
    model: in eval mode, with the weights of the best epoch.
    metrics: on the test images, which nothing was chosen by.
    history: one Epoch per epoch that ran.
    best_epoch: index into history of the weights kept.
    seconds: wall time of the training loop.
    """

    name: str
    seed: int
    model: nn.Module
    metrics: Metrics
    history: tuple[Epoch, ...]
    best_epoch: int
    seconds: float

    def metadata(self) -> dict[str, str]:
        """Everything but the model as text, for `lamina.save(result.model, path, result.metadata())`."""
        return {
            "name": self.name,
            "seed": str(self.seed),
            "metrics": json.dumps(asdict(self.metrics)),
            "history": json.dumps([asdict(epoch) for epoch in self.history]),
            "best_epoch": str(self.best_epoch),
            "seconds": f"{self.seconds:.3f}",
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], model: nn.Module) -> TrainResult:
        """The inverse of `metadata`. Raises KeyError, TypeError or ValueError for text that it did not write."""
        return cls(
            name=metadata["name"],
            seed=int(metadata["seed"]),
            model=model,
            metrics=Metrics(**json.loads(metadata["metrics"])),
            history=tuple(Epoch(**epoch) for epoch in json.loads(metadata["history"])),
            best_epoch=int(metadata["best_epoch"]),
            seconds=float(metadata["seconds"]),
        )


def train(
    name: str,
    *,
    seed: int = 0,
    epochs: int | None = None,
    progress: bool = True,
    recipe: Recipe | None = None,
    splits: data.Splits | None = None,
    state_file: str | Path | None = None,
    report: Callable[[Epoch], None] | None = None,
) -> TrainResult:
    """Trains one of the small models from scratch.

    Args:
        name: a key of RECIPES.
        seed: of the weights, the order of the images and their augmentation.
        epochs: instead of the recipe's.
        progress: draw a progress bar with epoch, loss and validation accuracy.
        recipe: instead of RECIPES[name].
        splits: what to use instead of `data.mnist()` or `data.dates()`.
        state_file: where the state is kept after each epoch and taken up from, so that nothing is lost when training is
            interrupted (see `resumable`); remove it once the model is saved.
        report: called with each epoch, instead of the progress bar.

    Raises:
        ValueError: no recipe for `name`, or less than one epoch.

    Torch's global generator is left as it was found.

    Example:
        >>> result = train("lenet", progress=False)
        >>> result.metrics.accuracy > 0.98
        True
    """
    if name not in RECIPES:
        raise ValueError(f"there is no training recipe for {name!r}; the known ones are {', '.join(sorted(RECIPES))}")
    recipe = recipe or RECIPES[name]
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    if recipe.epochs < 1:
        raise ValueError(f"training takes at least 1 epoch, not {recipe.epochs}")
    task = _TASKS.get(name, _CLASSIFICATION)
    splits = splits or task.splits()

    bar = nullcontext(report) if report is not None else _bar(name, recipe.epochs, progress)
    with torch.random.fork_rng(devices=[]), bar as tell:
        torch.manual_seed(seed)
        model = models.create(name)
        run = Run(model, recipe, splits, seed=seed, task=task)
        of = {"name": name, "seed": seed, "recipe": asdict(recipe)}
        for epoch in run if state_file is None else resumable(run, state_file, of):
            tell(epoch)
        run.finish()
    return TrainResult(
        name=name,
        seed=seed,
        model=model,
        metrics=evaluate(model, *splits.test),
        history=tuple(run.history),
        best_epoch=run.best_epoch,
        seconds=run.seconds,
    )


# loss(x, y, logits, targets): x as the model got it, y of the data, logits and targets that belong together.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Run:
    """The training of one model, an epoch at a time; it can be put away after any epoch and taken up again.

    Iterating trains and gives each finished Epoch; `finish` loads the weights of the best one. Between two epochs
    `state` is all that the rest depends on: a Run made in the same way that takes it with `load_state` goes on to the
    same bits.

    Args:
        model: trained in place.
        recipe, splits: as in `train`.
        seed: of the order of the images and their augmentation.
        task: what kind of data it is, by default that of splits.
        loss: of a batch, instead of the cross entropy.
        after_step: called after each step of the optimizer.
        choose_from: the first epoch whose weights may be kept; patience counts from there too.

    Dropout draws from torch's global generator, whose state is part of `state` too.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        splits: data.Splits,
        *,
        seed: int,
        task: Task | None = None,
        loss: Loss | None = None,
        after_step: Callable[[], None] | None = None,
        choose_from: int = 0,
    ) -> None:
        self.model, self.recipe, self.splits = model, recipe, splits
        self.task = task or task_of(splits)
        self.loss = loss or (lambda x, y, logits, targets: _loss(logits, targets, recipe))
        self.after_step = after_step or (lambda: None)
        self.choose_from = choose_from
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = _optimizer(model, recipe)
        self.steps_per_epoch = math.ceil(len(splits.train) / recipe.batch_size)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=recipe.learning_rate,
            epochs=recipe.epochs,
            steps_per_epoch=self.steps_per_epoch,
            pct_start=0.2,
        )
        self.history: list[Epoch] = []
        self.seconds = 0.0
        self.best_epoch: int | None = None
        self.best_weights: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Epoch]:
        while not self.done:
            start = time.perf_counter()
            self._train_epoch()
            self.seconds += time.perf_counter() - start
            yield self.history[-1]

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or so many were no better than the best that patience is."""
        waited = len(self.history) - 1 - self.best_epoch if self.best_epoch is not None else 0
        return len(self.history) >= self.recipe.epochs or waited >= self.recipe.patience

    def finish(self) -> None:
        """Leave the model in eval mode with the weights of the best epoch."""
        self.model.load_state_dict(self.best_weights)
        self.model.eval()

    def _train_epoch(self) -> None:
        x, y = self.splits.train
        self.model.train()
        total = 0.0
        for batch in torch.randperm(len(y), generator=self.generator).split(self.recipe.batch_size):
            inputs = self.task.augmented(x[batch], self.recipe, self.generator)
            logits = self.task.logits(self.model, inputs, y[batch])
            loss = self.loss(inputs, y[batch], logits, self.task.targets(y[batch]))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
            self.schedule.step()
            self.after_step()
            total += loss.item() * len(batch)
        validation_logits = _in_slices(self.model, *self.splits.validation, self.task.logits)
        targets = self.task.targets(self.splits.validation.y)
        index = len(self.history)
        self.history.append(
            Epoch(
                loss=total / len(y),
                validation_loss=_loss(validation_logits, targets, self.recipe).item(),
                validation_accuracy=_share_right(validation_logits.argmax(-1), targets),
            )
        )
        # The last epoch is chosen where no other may be.
        if index < min(self.choose_from, self.recipe.epochs - 1):
            return
        best = self.best_epoch
        if best is None or self.history[index].validation_loss < self.history[best].validation_loss:
            self.best_epoch = index
            self.best_weights = copy.deepcopy(self.model.state_dict())

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors, and what JSON can hold, to be given to `load_state` as they are."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for index, of_parameter in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in of_parameter.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["global generator"] = torch.get_rng_state()
        history = [asdict(epoch) for epoch in self.history]
        return tensors, {"history": history, "best_epoch": self.best_epoch, "seconds": self.seconds}

    def load_state(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Go on after the epoch in which `state` gave these. Raises KeyError, TypeError or RuntimeError for others."""
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = tensor
        history = [Epoch(**epoch) for epoch in values["history"]]
        self.model.load_state_dict(parts["model"])
        optimizer = self.optimizer.state_dict()
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            optimizer["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has not stepped as often
            for _ in range(len(history) * self.steps_per_epoch):
                self.schedule.step()
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["global generator"])
        self.history, self.seconds = history, values["seconds"]
        self.best_epoch, self.best_weights = values["best_epoch"], parts["best"]


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def resumable(
    run: Run, path: str | Path, of: Mapping[str, Any] | None = None, also: _Stateful | None = None
) -> Iterator[Epoch]:
    """Iterates a Run from where an earlier process left it, and keeps the file at `path` up to date after each epoch.

    Past epochs come first. An interrupted epoch is trained again, to the same bits on the same number of threads.

    Args:
        path: a safetensors file, replaced as a whole; the caller removes it when all is done.
        of: what is trained, in values that JSON keeps; a file of something else is an error.
        also: what else has a state of its own between epochs, in values that JSON keeps.

    Raises lamina.FormatError if the file is damaged or of another training.
    """
    from lamina.errors import FormatError
    from lamina.serialization import load_tensors, save_tensors

    path, of = Path(path), dict(of or {})
    if path.exists():
        tensors, values = load_tensors(path)
        if values.get("of") != of:
            raise FormatError(f"{path} is of another training: {values.get('of')}, not {of}; remove it to start anew")
        try:
            run.load_state(tensors, values)
            if also is not None:
                also.load_state_dict(values["also"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"{path} does not fit this training: {reason}; remove it to start anew") from error
        yield from list(run.history)
    for epoch in run:
        tensors, values = run.state()
        save_tensors(tensors, path, {**values, "of": of, "also": also.state_dict() if also is not None else None})
        yield epoch


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_weight = parameter.ndim >= 2 and "embedding" not in name and "token" not in name
        (decayed if is_weight else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


@contextmanager
def _bar(name: str, epochs: int, progress: bool) -> Iterator[Callable[[Epoch], None]]:
    """Gives a function to call with every finished epoch; draws on the terminal while the block runs."""
    if not progress:
        yield lambda epoch: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epoch"),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  val accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(f"train {name}", total=epochs, loss="-", accuracy="-")

        def report(epoch: Epoch) -> None:
            bar.update(task, advance=1, loss=f"{epoch.loss:.4f}", accuracy=f"{epoch.validation_accuracy:.1%}")

        yield report


def _loss(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Cross entropy of logits [..., classes] and targets [...], int64."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=recipe.label_smoothing)


class Task:
    """What of training depends on the kind of data: here images and their classes."""

    def splits(self) -> data.Splits:
        return data.mnist()

    def augmented(self, x: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
        return data.augment(x, generator) if recipe.augment else x

    def inputs(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model is called with in training."""
        return (x,)

    def logits(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Those that training compares with `targets(y)`."""
        return model(*self.inputs(x, y))

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def predicted(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the model answers without knowing y, of the shape of `targets(y)`."""
        return model(x).argmax(-1)


class _Translation(Task):
    """Texts and answers as tokens: every token from all before it, or in use from those the model gave itself."""

    def splits(self) -> data.Splits:
        return data.dates()

    def augmented(self, x: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
        return x

    def inputs(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, y[:, :-1], _lengths(x)

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        return y[:, 1:]

    def predicted(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model.greedy_decode(x, y.shape[1] - 1, _lengths(x))


def _lengths(x: torch.Tensor) -> torch.Tensor:
    return (x != data.PAD).sum(1)


_CLASSIFICATION, _TRANSLATION = Task(), _Translation()
_TASKS = {"seq2seq_dates": _TRANSLATION}


def splits_of(name: str) -> data.Splits:
    """What the recipe of `name` trains on."""
    return _TASKS.get(name, _CLASSIFICATION).splits()


def task_of(splits: data.Splits) -> Task:
    """What kind of data it is: images and classes, or texts and answers."""
    return _TRANSLATION if splits.train.y.ndim > 1 else _CLASSIFICATION


@torch.no_grad()
def _in_slices(model: nn.Module, x: torch.Tensor, y: torch.Tensor, function: Callable[..., torch.Tensor]):
    """function(model, x, y) in eval mode and in slices; the mode the model was in is restored."""
    was_training = model.training
    model.eval()
    slices = zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH), strict=True)
    results = torch.cat([function(model, *part) for part in slices])
    model.train(was_training)
    return results


def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Metrics:
    """Accuracy, and recall and F1 averaged over the classes that occur, of a classifier or a Seq2Seq.

    Args:
        model: x -> logits [N, classes], or what has the `greedy_decode` of `lamina.models.Seq2Seq`; run in eval mode.
        x: [N, ...] inputs.
        y: [N] int64 labels, or [N, T] int64 tokens, from begin to end.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> evaluate(load_or_train("lenet", "models")[0], *data.mnist().test)
        Metrics(accuracy=0.985, recall=0.985, f1=0.985)
    """
    try:
        from sklearn.metrics import f1_score, recall_score
    except ImportError as error:
        raise ImportError("recall and F1 are scikit-learn's: pip install lamina[models]") from error
    task = _TRANSLATION if y.ndim > 1 else _CLASSIFICATION
    predicted, targets = _in_slices(model, x, y, task.predicted), task.targets(y)
    labels = targets.flatten(), predicted.flatten()
    return Metrics(
        accuracy=_share_right(predicted, targets),
        recall=float(recall_score(*labels, average="macro", zero_division=0)),
        f1=float(f1_score(*labels, average="macro", zero_division=0)),
    )


def _share_right(predicted: torch.Tensor, targets: torch.Tensor) -> float:
    """Of labels [N], or of whole rows [N, T]."""
    right = predicted == targets
    return (right.all(1) if right.ndim > 1 else right).double().mean().item()


def load_or_train(
    name: str, directory: str | Path, *, seed: int = 0, progress: bool = True
) -> tuple[nn.Module, TrainResult]:
    """The trained model out of directory/name.safetensors; if there is no such file, trains it and writes the file.

    Returns the model in eval mode, and the result of the training, whenever it took place.

    Raises:
        lamina.FormatError: the file is damaged or holds something else; it is left as it is.
        ValueError: the file was trained with another seed, or there is no recipe for `name`.

    Example:
        >>> model, result = load_or_train("lenet", "models")
        >>> model(data.mnist().test.x[:1]).argmax().item()
    """
    from lamina.serialization import save

    if name not in RECIPES:
        raise ValueError(f"there is no training recipe for {name!r}; the known ones are {', '.join(sorted(RECIPES))}")
    path = Path(directory) / f"{name}.safetensors"
    if not path.exists():
        result = train(name, seed=seed, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(result.model, path, result.metadata())
        return result.model, result

    model, result = load(name, path)
    if result.seed != seed:
        raise ValueError(f"{path} was trained with seed {result.seed}, not {seed}; move it away to train {name} anew")
    return model, result


def load(name: str, path: str | Path) -> tuple[nn.Module, TrainResult]:
    """The trained model out of a file that `lamina train` or `load_or_train` wrote, in eval mode.

    Raises FileNotFoundError, and lamina.FormatError if the file is damaged or holds something else.

    Example:
        >>> model, result = load("lenet", "models/lenet.safetensors")
    """
    from lamina.errors import FormatError
    from lamina.serialization import load_

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        model = models.create(name).eval()
    metadata = load_(model, path)
    try:
        result = TrainResult.from_metadata(metadata, model)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} does not say how its model was trained; lamina.train did not write it") from error
    if result.name != name:
        raise FormatError(f"{path} holds the model {result.name!r}, not {name!r}")
    return model, result


def print_result(result: TrainResult) -> None:
    """Prints accuracy, recall and F1 on the test images as a small table.

    Example:
        >>> print_result(train("mlp", progress=False))
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "accuracy", "recall", "F1", "epochs", "seconds")
    shares = (f"{share:.2%}" for share in (result.metrics.accuracy, result.metrics.recall, result.metrics.f1))
    table.add_row(result.name, *shares, str(len(result.history)), f"{result.seconds:.1f}")
    Console().print(table)
