"""A detector in the manner of "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks"
(Ren et al. 2015, arXiv:1506.01497): backbone, region proposals, and a head that judges each proposal.

The backbone is a ResNet of three stages; proposals are sampled by "Mask R-CNN"'s RoIAlign (arXiv:1703.06870). All
sizes are fixed by the config, so that no shape depends on what is in an image. Boxes are (left, top, right, bottom) in
pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.models.registry import register
from lamina.models.resnet import ResNetConfig, make_stages, make_stem

# A box grows by at most this in one step, as in the authors' code: exp of an untrained output may overflow.
_MOST_LOG_GROWTH = math.log(1000 / 16)


@dataclass(frozen=True)
class DetectorConfig:
    """
    in_channels, image_size: the images, [B, in_channels, image_size, image_size], image_size a multiple of 16.
    depths, width: of the backbone's basic blocks; its last stage has stride 16.
    anchor_sizes, anchor_ratios: sides of square anchors in pixels, and heights by widths of the anchors of that area.
    candidates: best anchors of an image that are looked at; proposals: how many are left of them; detections: how many
        of these an image gives.
    roi_size: the side of the map that is sampled from a proposal.
    hidden: width of the head.
    num_classes: without the background.
    """

    in_channels: int = 3
    image_size: int = 512
    depths: tuple[int, ...] = (2, 2, 2)
    width: int = 64
    anchor_sizes: tuple[int, ...] = (32, 128, 256)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    candidates: int = 600
    proposals: int = 100
    detections: int = 20
    roi_size: int = 7
    hidden: int = 1024
    num_classes: int = 20


@register(detector=DetectorConfig())
class Detector(nn.Module):
    """In evaluation: images [B, C, S, S] float32 -> boxes [B, detections, 4] float32, scores [B, detections] float32 in
    falling order, 0 where there is no more, labels [B, detections] int64 from 0 to num_classes - 1.

    In training, for the losses: objectness [B, anchors], anchor moves [B, anchors, 4], class logits
    [B, proposals, 1 + num_classes] (background first), box moves [B, proposals, num_classes, 4].

    Example:
        >>> config = DetectorConfig(image_size=64, depths=(1, 1, 1), width=8, candidates=50, proposals=10, detections=5)
        >>> boxes, scores, labels = Detector(config).eval()(torch.rand(2, 3, 64, 64))
        >>> boxes.shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config
        resnet = ResNetConfig(depths=config.depths, width=config.width, in_channels=config.in_channels)
        self.stride = 2 ** (1 + len(config.depths))
        if config.image_size % self.stride:
            raise ValueError(f"Detector image_size {config.image_size} is no multiple of its stride {self.stride}")
        stages, channels = make_stages(resnet)
        self.backbone = nn.Sequential(make_stem(resnet), *stages)
        per_place = len(config.anchor_sizes) * len(config.anchor_ratios)
        self.proposer = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.ReLU())
        self.objectness = nn.Conv2d(channels, per_place, kernel_size=1)
        self.anchor_moves = nn.Conv2d(channels, 4 * per_place, kernel_size=1)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * config.roi_size**2, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
        )
        self.classes = nn.Linear(config.hidden, 1 + config.num_classes)
        self.box_moves = nn.Linear(config.hidden, 4 * config.num_classes)
        self.register_buffer("anchors", make_anchors(config, self.stride), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)  # [B, channels, S/16, S/16]
        objectness, anchor_moves = self.score_anchors(features)
        proposals = self.propose(objectness.detach(), anchor_moves.detach())
        logits, moves = self.judge(features, proposals)
        if self.training:
            return objectness, anchor_moves, logits, moves
        return self.detect(proposals, logits, moves)

    def score_anchors(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, C, H, W] -> objectness [B, A], moves [B, A, 4]; anchors of one place stand together."""
        x = self.proposer(features)
        objectness = self.objectness(x).permute(0, 2, 3, 1).flatten(1)
        moves = self.anchor_moves(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        return objectness, moves

    def propose(self, objectness: Tensor, moves: Tensor) -> Tensor:
        """The best anchors, moved, without those that lie upon better ones: boxes [B, proposals, 4]."""
        count = min(self.config.candidates, objectness.shape[1])
        scores, chosen = objectness.topk(count, dim=1)
        boxes = move(self.anchors[chosen], _rows(moves, chosen)).clamp(0, self.config.image_size)
        kept = suppress(boxes, scores, 0.7)
        # Those suppressed come after all others, for images that give too few.
        best = scores.sigmoid().masked_fill(~kept, -1.0).topk(min(self.config.proposals, count), dim=1).indices
        return _rows(boxes, best)

    def judge(self, features: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, P, 1 + classes] and box moves [B, P, classes, 4] of proposals [B, P, 4]."""
        sampled = roi_align(features, proposals / self.stride, self.config.roi_size)  # [B, P, C, 7, 7]
        hidden = self.head(sampled.flatten(0, 1)).unflatten(0, proposals.shape[:2])
        return self.classes(hidden), self.box_moves(hidden).unflatten(2, (self.config.num_classes, 4))

    def detect(self, proposals: Tensor, logits: Tensor, moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each proposal as the class it is most likely of, without those that lie upon better ones of their class."""
        scores, labels = logits.softmax(dim=2)[:, :, 1:].max(dim=2)
        chosen = labels[:, :, None, None].expand(-1, -1, 1, 4)
        boxes = move(proposals, moves.gather(2, chosen)[:, :, 0]).clamp(0, self.config.image_size)
        # Boxes of other classes are moved out of each other's way.
        apart = boxes + (labels * 2 * self.config.image_size)[:, :, None]
        scores = scores.masked_fill(~suppress(apart, scores, 0.5), 0.0)
        scores, best = scores.topk(min(self.config.detections, scores.shape[1]), dim=1)
        return _rows(boxes, best), scores, labels.gather(1, best)

    @staticmethod
    def example_inputs(config: DetectorConfig, batch: int) -> tuple[Tensor]:
        return (torch.rand(batch, config.in_channels, config.image_size, config.image_size),)


def make_anchors(config: DetectorConfig, stride: int) -> Tensor:
    """Boxes [places * sizes * ratios, 4] around the middle of each place of the feature map, row by row."""
    middle = (torch.arange(config.image_size // stride) + 0.5) * stride
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    shapes = [(size / ratio**0.5, size * ratio**0.5) for size in config.anchor_sizes for ratio in config.anchor_ratios]
    half = torch.tensor(shapes) / 2  # [sizes * ratios, (width, height)]
    around = torch.cat((-half, half), dim=1)
    return (torch.stack((x, y, x, y), dim=2).reshape(-1, 1, 4) + around).reshape(-1, 4)


def move(boxes: Tensor, moves: Tensor) -> Tensor:
    """Boxes [..., 4] moved by (dx, dy) of their size and scaled by exp(dw, dh)."""
    size = boxes[..., 2:] - boxes[..., :2]
    middle = boxes[..., :2] + size / 2 + moves[..., :2] * size
    half = size * moves[..., 2:].clamp(max=_MOST_LOG_GROWTH).exp() / 2
    return torch.cat((middle - half, middle + half), dim=-1)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: which boxes [B, N, 4] no better one that stays overlaps by more than `threshold`.

    overlap: intersection by union; of equal scores the earlier is better. Returns [B, N] bool. From the best box down
    each is decided by those above it, so that the decisions, all made at once, settle after at most N rounds.
    """
    better = scores[:, :, None] > scores[:, None, :]  # [B, by, N]
    equal = scores[:, :, None] == scores[:, None, :]
    better |= equal & torch.ones_like(equal).triu(1)
    over = better & (overlap(boxes) > threshold)
    stays = torch.ones_like(scores, dtype=torch.bool)
    while True:
        settled = ~(over & stays[:, :, None]).any(dim=1)
        if torch.equal(settled, stays):
            return stays
        stays = settled


def overlap(boxes: Tensor) -> Tensor:
    """Intersection by union of every two boxes of an image: [B, N, 4] -> [B, N, N]."""
    size = boxes[..., 2:] - boxes[..., :2]
    area = size[..., 0] * size[..., 1]
    first, second = boxes[:, :, None], boxes[:, None, :]
    common = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    intersection = common[..., 0] * common[..., 1]
    return intersection / (area[:, :, None] + area[:, None, :] - intersection).clamp_min(1e-12)


def roi_align(features: Tensor, boxes: Tensor, size: int) -> Tensor:
    """RoIAlign with four bilinear samples in each of size x size parts of a box.

    features: [B, C, H, W]; boxes: [B, P, 4] in pixels of the features, pixel 0 reaching from 0 to 1. Samples beyond the
    map take its border. Returns [B, P, C, size, size].
    """
    count = 2 * size
    steps = (torch.arange(count, device=boxes.device) + 0.5) / count
    extent = boxes.new_tensor(features.shape[:1:-1])  # W, H
    corner, far = boxes[..., :2] / extent, boxes[..., 2:] / extent  # as parts of the map
    x, y = (corner + (far - corner) * steps[:, None, None, None]).unbind(-1)  # [count, B, P]
    x, y = x.permute(1, 2, 0)[:, :, None, :], y.permute(1, 2, 0)[:, :, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # [B, P, count, count, 2]
    sampled = F.grid_sample(features, 2 * grid.flatten(1, 2) - 1, padding_mode="border", align_corners=False)
    parts = sampled.unflatten(2, (boxes.shape[1], size, 2)).unflatten(5, (size, 2))  # [B, C, P, size, 2, size, 2]
    return parts.mean(dim=(4, 6)).transpose(1, 2)


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """The rows `chosen` [B, M] of values [B, N, 4]."""
    return values.gather(1, chosen[:, :, None].expand(-1, -1, values.shape[2]))
