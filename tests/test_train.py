"""Training lowers the loss, keeps the best weights, repeats itself, and files come back as they went."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from lamina import data, models, train
from lamina.errors import FormatError
from lamina.serialization import save


def first(part, count):
    return type(part)(part.x[:count], part.y[:count])


@pytest.fixture(scope="module")
def splits():
    full = data.mnist()
    return data.Splits(first(full.train, 600), first(full.validation, 200), first(full.test, 200))


@pytest.fixture(scope="module")
def result(splits):
    return train.train("mlp", epochs=4, progress=False, splits=splits)


def test_loss_falls_and_accuracy_is_far_above_chance(result):
    losses = [epoch.loss for epoch in result.history]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    assert result.metrics.accuracy > 0.6
    assert not result.model.training
    assert result.seconds > 0


def test_training_repeats_itself_and_leaves_the_global_generator(result, splits):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    again = train.train("mlp", epochs=4, progress=False, splits=splits)
    assert torch.equal(torch.rand(3), expected)
    assert again.history == result.history
    assert again.metrics == result.metrics
    for key, weight in result.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[key])
    other = train.train("mlp", seed=1, epochs=1, progress=False, splits=splits)
    assert other.history[0] != result.history[0]


def test_the_best_weights_are_restored_and_training_stops_early(splits):
    # Labels of chance: training images can be learnt by heart, so the validation loss must rise sooner or later.
    generator = torch.Generator().manual_seed(0)
    noise = data.Splits(
        *(
            data.Images(part.x, torch.randint(0, 10, (len(part),), generator=generator))
            for part in (splits.train, splits.validation, splits.test)
        )
    )
    recipe = train.Recipe(epochs=30, augment=False, patience=3)
    result = train.train("mlp", progress=False, recipe=recipe, splits=noise)
    assert len(result.history) == result.best_epoch + 1 + recipe.patience < 30
    losses = [epoch.validation_loss for epoch in result.history]
    assert min(losses) == losses[result.best_epoch]
    with torch.no_grad():
        logits = result.model(noise.validation.x)
    restored = nn.functional.cross_entropy(logits, noise.validation.y, label_smoothing=recipe.label_smoothing)
    assert restored.item() == pytest.approx(losses[result.best_epoch], rel=1e-5)
    assert restored.item() != pytest.approx(losses[-1], rel=1e-3)


@pytest.mark.parametrize("name", sorted(train.RECIPES))
def test_every_recipe_trains_its_model(name, splits):
    splits = data.dates() if name == "seq2seq_dates" else splits
    few = data.Splits(first(splits.train, 128), first(splits.validation, 128), first(splits.test, 128))
    result = train.train(name, epochs=1, progress=False, splits=few)
    assert result.name == name
    assert 0 < result.history[0].loss < 4


def test_seq2seq_learns_to_copy_dates():
    """ISO dates to ISO dates is learnt in seconds; the answers are judged whole, as the model gives them by itself."""
    splits = data.dates()

    def easy(part, count):
        y = part.y[:count]
        return data.Pairs(torch.cat([y[:, 1:-1], torch.zeros_like(y[:, :3])], 1), y)

    few = data.Splits(easy(splits.train, 2000), easy(splits.validation, 200), easy(splits.test, 200))
    recipe = dataclasses.replace(train.RECIPES["seq2seq_dates"], epochs=4, batch_size=32, learning_rate=8e-3)
    result = train.train("seq2seq_dates", progress=False, recipe=recipe, splits=few)
    assert result.history[-1].validation_loss < 0.5 * result.history[0].loss
    predicted = result.model.greedy_decode(few.test.x, 11, (few.test.x != data.PAD).sum(1))
    assert result.metrics.accuracy == (predicted == few.test.y[:, 1:]).all(1).double().mean().item()
    assert result.metrics.recall > 0.5


def test_weight_decay_spares_biases_norms_and_embeddings():
    model = models.create("vit_mnist")
    decayed, free = train._optimizer(model, train.Recipe(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)


class Fixed(nn.Module):
    """Answers the class that its input names."""

    def forward(self, x):
        assert not self.training
        return nn.functional.one_hot(x, 3).float()


def test_metrics_are_those_computed_by_hand():
    #   class 0: 4 images, 3 found, 1 false alarm: recall 3/4, precision 3/4, F1 3/4
    #   class 1: 2 images, 1 found, 2 false alarms: recall 1/2, precision 1/3, F1 2/5
    #   class 2: 2 images, 1 found, 0 false alarms: recall 1/2, precision 1, F1 2/3
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    answer = torch.tensor([0, 0, 0, 1, 1, 0, 2, 1])
    model = Fixed().train()
    metrics = train.evaluate(model, answer, truth)
    assert metrics.accuracy == pytest.approx(5 / 8)
    assert metrics.recall == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    assert metrics.f1 == pytest.approx((3 / 4 + 2 / 5 + 2 / 3) / 3)
    assert model.training


def test_evaluation_in_slices_covers_everything():
    truth = torch.arange(1000) % 3
    assert train.evaluate(Fixed(), truth, truth) == train.Metrics(1.0, 1.0, 1.0)


def test_unknown_recipe_lists_the_known_ones(tmp_path):
    message = "no training recipe for 'gpt2'; the known ones are cnn, gru, lenet, lstm, mlp, seq2seq_dates, vit_mnist$"
    with pytest.raises(ValueError, match=message):
        train.train("gpt2")
    with pytest.raises(ValueError, match=message):
        train.load_or_train("gpt2", tmp_path)


def test_no_epochs_is_refused():
    with pytest.raises(ValueError, match="at least 1 epoch, not 0"):
        train.train("mlp", epochs=0)


def test_metadata_survives_a_round_trip(result):
    metadata = result.metadata()
    assert all(isinstance(part, str) for item in metadata.items() for part in item)
    back = train.TrainResult.from_metadata(metadata, result.model)
    assert back == dataclasses.replace(result, seconds=back.seconds)
    assert back.seconds == pytest.approx(result.seconds, abs=1e-3)


@pytest.fixture
def trained_once(monkeypatch, result):
    """Makes train.train give `result`, and counts its calls."""
    calls = []

    def fake(name, *, seed, progress):
        calls.append((name, seed))
        return dataclasses.replace(result, name=name, seed=seed)

    monkeypatch.setattr(train, "train", fake)
    return calls


def test_load_or_train_trains_once_and_then_loads(trained_once, tmp_path, splits):
    trained, trained_result = train.load_or_train("mlp", tmp_path / "new", progress=False)
    state = torch.get_rng_state()
    loaded, loaded_result = train.load_or_train("mlp", tmp_path / "new", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert trained_once == [("mlp", 0)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlp.safetensors"]
    assert loaded is not trained
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(trained(splits.test.x), loaded(splits.test.x))
    assert loaded_result.metrics == trained_result.metrics
    assert loaded_result.history == trained_result.history
    assert loaded_result.model is loaded


def test_load_or_train_refuses_another_seed(trained_once, tmp_path):
    train.load_or_train("mlp", tmp_path, progress=False)
    with pytest.raises(ValueError, match="trained with seed 0, not 5"):
        train.load_or_train("mlp", tmp_path, seed=5, progress=False)


def test_load_or_train_leaves_a_damaged_file(trained_once, tmp_path):
    train.load_or_train("mlp", tmp_path, progress=False)
    path = tmp_path / "mlp.safetensors"
    damaged = path.read_bytes()[:1000]
    path.write_bytes(damaged)
    with pytest.raises(FormatError):
        train.load_or_train("mlp", tmp_path, progress=False)
    assert path.read_bytes() == damaged
    assert len(trained_once) == 1


@pytest.mark.parametrize("wrong", [{"metrics": "{}"}, {"history": "[1]"}, {"seed": "zero"}, {"name": "lenet"}])
def test_load_or_train_refuses_foreign_metadata(wrong, result, tmp_path):
    save(result.model, tmp_path / "mlp.safetensors", result.metadata() | wrong)
    with pytest.raises(FormatError, match=r"mlp\.safetensors"):
        train.load_or_train("mlp", tmp_path, progress=False)


def test_load_or_train_refuses_a_file_without_metadata(result, tmp_path):
    save(result.model, tmp_path / "mlp.safetensors")
    with pytest.raises(FormatError, match="does not say how its model was trained"):
        train.load_or_train("mlp", tmp_path, progress=False)


def test_print_result_shows_the_three_numbers(result, monkeypatch):
    page = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda: Console(file=page, width=80))
    train.print_result(dataclasses.replace(result, metrics=train.Metrics(0.98765, 0.5, 0.25), seconds=12.34))
    for text in ("mlp", "98.77%", "50.00%", "25.00%", "F1", "12.3"):
        assert text in page.getvalue()


def test_progress_shows_epoch_loss_and_accuracy(splits, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    few = data.Splits(first(splits.train, 64), first(splits.validation, 64), first(splits.test, 64))
    result = train.train("mlp", epochs=2, progress=True, splits=few)
    shown = capsys.readouterr().out
    assert "train mlp" in shown
    assert "2/2" in shown
    assert f"{result.history[-1].loss:.4f}" in shown
    assert f"{result.history[-1].validation_accuracy:.1%}" in shown


def test_a_state_belongs_to_one_training(splits, tmp_path):
    few = data.Splits(first(splits.train, 64), first(splits.validation, 64), first(splits.test, 64))
    path = tmp_path / "state.safetensors"

    def run(name="mlp"):
        torch.manual_seed(0)
        return train.Run(models.create(name), train.Recipe(epochs=2), few, seed=0)

    whole = list(run())
    assert next(train.resumable(run(), path, {"name": "mlp"})) == whole[0]
    assert list(train.resumable(run(), path, {"name": "mlp"})) == whole
    assert list(train.resumable(run(), path, {"name": "mlp"})) == whole  # nothing is left to train
    with pytest.raises(FormatError, match=r"is of another training: \{'name': 'mlp'\}, not \{'name': 'lenet'\}"):
        next(train.resumable(run("lenet"), path, {"name": "lenet"}))
    with pytest.raises(FormatError, match=r"does not fit this training: .*; remove it to start anew"):
        next(train.resumable(run("lenet"), path, {"name": "mlp"}))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError, match="truncated"):
        next(train.resumable(run(), path, {"name": "mlp"}))
