"""The network of BiDRN: a whole-body mesh-recovery network with binary convolutions, up to the regressed parameters.

The host is Hand4Whole: a backbone each for the body, both hands and the face, position nets with soft-argmax, rotation
regressors, and BoxNet, which finds hands and face. What stays real: the three stems, the projections around blocks
(``block_residual="fp"``), batch normalization and all heads. The body model, its losses and data are not part of this.
Sizes are arguments, so that a small network is the same code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, max_pool2d, softmax

from hf_lowbit.methods.bidrn.blocks import BiDRB, UpSample, block_shapes, projection
from hf_lowbit.methods.bidrn.modules import BinaryConvTranspose2d
from hf_lowbit.methods.bidrn.options import UnitOptions

LAYERS = {18: ("basic", (2, 2, 2, 2)), 50: ("bottleneck", (3, 4, 6, 3))}
BODY_JOINTS, HAND_JOINTS, MCP_JOINTS = 25, 20, (4, 8, 12, 16)
BODY_POSES, HAND_POSES, SHAPES, EXPRESSIONS = 21, 15, 10, 10
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Style:
    """Which convolutions are binary, and how.

    Attributes:
        binarize: the backbones' convolutions.
        binarize_box: BoxNet's transposed convolutions.
        block_residual: of backbone blocks.
        named: named modules where shapes change.
        options: of the units.
    """

    binarize: bool = True
    binarize_box: bool = True
    block_residual: str = "fp"
    named: bool = False
    options: UnitOptions = UnitOptions()  # noqa: RUF009  frozen


class RealBlock(nn.Module):
    """A residual block of the float network: convolutions with ReLU, and one after the sum."""

    def __init__(self, channels: int, out_channels: int, stride: int, kind: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for ins, outs, size, step in block_shapes(channels, out_channels, stride, kind):
            layers += [nn.Conv2d(ins, outs, size, step, size // 2, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]
        self.units = nn.Sequential(*layers[:-1])
        self.around: nn.Module = nn.Identity()
        if channels != out_channels or stride != 1:
            self.around = projection(channels, out_channels, stride, False, None)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.activation(self.units(x) + self.around(x))
        return out


class Backbone(nn.Module):
    """A ResNet without its classifier: (N, 3, H, W) to (N, width · 8 · (4 or 1), H / 32, W / 32)."""

    def __init__(self, depth: int, width: int, style: Style) -> None:
        super().__init__()
        if depth not in LAYERS:
            raise ValueError(f"depth must be one of {', '.join(map(str, LAYERS))}, got {depth}")
        kind, counts = LAYERS[depth]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width))
        self.stem_activation = nn.Identity() if style.binarize else nn.ReLU()
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(counts):
            outs = width * 2**stage * (4 if kind == "bottleneck" else 1)
            for number in range(count):
                stride = 2 if stage and not number else 1
                if style.binarize:
                    residual = {"block_residual": style.block_residual, "named": style.named}
                    blocks.append(BiDRB(channels, outs, stride, kind=kind, options=style.options, **residual))  # type: ignore[arg-type]
                else:
                    blocks.append(RealBlock(channels, outs, stride, kind))
                channels = outs
        self.blocks = nn.Sequential(*blocks)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        x = max_pool2d(self.stem_activation(self.stem(x)), 3, 2, 1)
        out: Tensor = self.blocks(x)
        return out


def _expected(heat: Tensor, axis: int) -> Tensor:
    """Return the mean place along one axis of heat maps (..., sizes) that sum to 1; other axes are summed."""
    others = [a for a in range(2, heat.dim()) if a != axis]
    along = heat.sum(others) if others else heat
    return (along * torch.arange(along.shape[-1], dtype=heat.dtype, device=heat.device)).sum(-1)


def soft_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return heat maps and mean places of (N, joints, [depth,] rows, columns).

    Returns:
        The maps, softmax over all places, and (N, joints, 2 or 3): column, row and, if there is one, depth.
    """
    heat = softmax(logits.flatten(2).float(), 2).view(logits.shape).to(logits.dtype)
    axes = range(heat.dim() - 1, 1, -1)
    return heat, torch.stack([_expected(heat, axis) for axis in axes], 2)


def sample(features: Tensor, places: Tensor) -> Tensor:
    """Return features at places by bilinear interpolation.

    Args:
        features: (N, C, H, W).
        places: (N, joints, 2): column and row, in steps of the features, 0 at the first.

    Returns:
        (N, joints, C).
    """
    size = places.new_tensor([max(features.shape[3] - 1, 1), max(features.shape[2] - 1, 1)])
    grid = (places / size * 2 - 1).unsqueeze(1)
    return grid_sample(features, grid.to(features.dtype), align_corners=True)[:, :, 0].transpose(1, 2)


def crop(images: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Return what lies in a box of each image, bilinearly; 0 outside the image.

    Args:
        images: (N, C, H, W).
        boxes: (N, 4): left, top, right, bottom, from 0 to 1.
        size: rows and columns of the result.

    Returns:
        (N, C, *size).  Differs: the host averages several samples for each pixel (RoIAlign of torchvision).
    """
    left, top, right, bottom = boxes.unbind(1)
    zero = torch.zeros_like(left)
    theta = torch.stack([right - left, zero, right + left - 1, zero, bottom - top, bottom + top - 1], 1).view(-1, 2, 3)
    grid = affine_grid(theta, [boxes.shape[0], images.shape[1], *size], align_corners=False)
    return grid_sample(images, grid.to(images.dtype), align_corners=False)


class PositionNet(nn.Module):
    """Joints from features: a 1 × 1 convolution to heat maps of ``depth`` layers, soft-argmax over their volume."""

    def __init__(self, channels: int, joints: int, depth: int) -> None:
        super().__init__()
        self.joints, self.depth = joints, depth
        self.conv = nn.Conv2d(channels, joints * depth, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return heat maps (N, joints, depth, H, W) and places (N, joints, 3)."""
        return soft_argmax(self.conv(features).unflatten(1, (self.joints, self.depth)))


def _reduce(channels: int, outs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, outs, 1), nn.BatchNorm2d(outs), nn.ReLU())


def _at_joints(features: Tensor, places: Tensor) -> Tensor:
    return torch.cat([sample(features, places[..., :2]), places], 2)


class BodyRotation(nn.Module):
    """Rotations of the body, its shape and the camera, from features at the joints of body and hands."""

    def __init__(self, channels: int, hand_channels: int, width: int) -> None:
        super().__init__()
        self.body = _reduce(channels, width)
        self.left, self.right = _reduce(hand_channels, width), _reduce(hand_channels, width)
        joints = BODY_JOINTS + 2 * len(MCP_JOINTS)
        self.root_pose = nn.Linear(joints * (width + 3), 6)
        self.body_pose = nn.Linear(joints * (width + 3), BODY_POSES * 6)
        self.shape, self.camera = nn.Linear(channels, SHAPES), nn.Linear(channels, 3)

    def forward(self, features: Tensor, places: Tensor, left: Any, right: Any) -> dict[str, Tensor]:
        """Return the parameters; ``left`` and ``right`` are features of a hand and places of its knuckles."""
        mean = features.mean((2, 3))
        parts = [_at_joints(self.body(features), places)]
        parts += [_at_joints(net(part), at) for net, (part, at) in ((self.left, left), (self.right, right))]
        flat = torch.cat(parts, 1).flatten(1)
        return {
            "root_pose": self.root_pose(flat),
            "body_pose": self.body_pose(flat).unflatten(1, (BODY_POSES, 6)),
            "shape": self.shape(mean),
            "cam": self.camera(mean),
        }


class HandRotation(nn.Module):
    """Rotations of a hand, from features at its joints."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.hand = _reduce(channels, width)
        self.pose = nn.Linear(HAND_JOINTS * (width + 3), HAND_POSES * 6)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        """Return (N, 15, 6)."""
        out: Tensor = self.pose(_at_joints(self.hand(features), places).flatten(1))
        return out.unflatten(1, (HAND_POSES, 6))


class BoxNet(nn.Module):
    """Boxes of both hands and the face, from body features and the heat maps of the joints."""

    def __init__(self, channels: int, width: int, style: Style) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for ins in (channels, width, width):
            if style.binarize_box and style.named and ins == width and width % 2 == 0:
                # half the channels come out, so the input is doubled; see UpSample
                layers += [_Twice(), UpSample(2 * width, 3, style.options)]
            elif style.binarize_box:
                layers.append(BinaryConvTranspose2d(ins, width, 4, 2, 1, options=style.options))
            else:
                conv = nn.ConvTranspose2d(ins, width, 4, 2, 1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.up = nn.Sequential(*layers)
        self.center = nn.Conv2d(width, 3, 1)
        self.sizes = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)) for _ in range(3)
        )

    def forward(self, features: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
        """Return centers and sizes (N, 3, 2) of left hand, right hand and face, as shares of the image."""
        x = self.up(torch.cat([features, heat.flatten(1, 2).to(features.dtype)], 1))
        _, centers = soft_argmax(self.center(x))
        found = sample(x, centers.detach())
        sizes = torch.stack([net(found[:, i]) for i, net in enumerate(self.sizes)], 1)
        scale = centers.new_tensor([x.shape[3], x.shape[2]])
        return (centers + 0.5) / scale, torch.sigmoid(sizes)


class _Twice(nn.Module):
    """The input twice along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 2 C, H, W)."""
        return torch.cat([x, x], 1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the network; the defaults are Hand4Whole's.

    Attributes:
        body_depth, hand_depth, face_depth: of the backbones, 18 or 50.
        width: channels of the stems.
        head_width: channels of heads and of BoxNet, (rotation nets, BoxNet).
        body_shape, hand_shape, face_shape: rows and columns of the images, multiples of 32.
        heat_depth: layers of heat maps.
    """

    body_depth: int = 50
    hand_depth: int = 50
    face_depth: int = 18
    width: int = 64
    head_width: Size = (512, 256)
    body_shape: Size = (256, 192)
    hand_shape: Size = (256, 256)
    face_shape: Size = (192, 192)
    heat_depth: int = 8


class BodyMeshNet(nn.Module):
    """The network: images to parameters of the body model."""

    def __init__(self, sizes: Sizes, style: Style) -> None:
        super().__init__()
        self.sizes = sizes
        self.body = Backbone(sizes.body_depth, sizes.width, style)
        self.hand = Backbone(sizes.hand_depth, sizes.width, style)
        self.face = Backbone(sizes.face_depth, sizes.width, style)
        body, hand, depth = self.body.channels, self.hand.channels, sizes.heat_depth
        rotation, box = sizes.head_width
        self.body_position = PositionNet(body, BODY_JOINTS, depth)
        self.hand_position = PositionNet(hand, HAND_JOINTS, depth)
        self.body_rotation = BodyRotation(body, hand, rotation)
        self.hand_rotation = HandRotation(hand, rotation)
        self.box = BoxNet(body + BODY_JOINTS * depth, box, style)
        self.expression, self.jaw = nn.Linear(self.face.channels, EXPRESSIONS), nn.Linear(self.face.channels, 6)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the parameters of (N, 3, H, W), resized to ``body_shape`` for the body; see the model's output."""
        sizes = self.sizes
        body = nn.functional.interpolate(images, sizes.body_shape)
        features = self.body(body)
        heat, places = self.body_position(features)
        centers, extents = self.box(features, heat.detach())
        boxes = _boxes(
            centers, extents, (2.0, 2.0, 1.5), (sizes.hand_shape, sizes.hand_shape, sizes.face_shape), sizes
        )
        hands = [crop(images, boxes[:, i], sizes.hand_shape) for i in (0, 1)]
        hands[0] = hands[0].flip(3)  # a left hand is looked at as a right one
        hand_features = self.hand(torch.cat(hands))
        _, hand_places = self.hand_position(hand_features)
        poses = self.hand_rotation(hand_features, hand_places.detach())
        count = images.shape[0]
        left, right = (
            _unflipped(hand_features[:count], hand_places[:count]),
            (hand_features[count:], hand_places[count:]),
        )
        knuckles = [(part, at[:, list(MCP_JOINTS)].detach()) for part, at in (left, right)]
        found = self.body_rotation(features, places.detach(), *knuckles)
        face = self.face(crop(images, boxes[:, 2], sizes.face_shape)).mean((2, 3))
        return {
            **found,
            "lhand_pose": _mirrored(poses[:count]),
            "rhand_pose": poses[count:],
            "expr": self.expression(face),
            "jaw": self.jaw(face),
            "joint_img": torch.cat([places, left[1], right[1]], 1),
            "box_centers": centers,
            "box_sizes": extents,
        }


def _boxes(centers: Tensor, extents: Tensor, grow: Any, shapes: Any, sizes: Sizes) -> Tensor:
    """Return (N, 3, 4) boxes as shares of the image, with the shape of the crop and some room around them."""
    factor = extents.new_tensor(grow)[None, :, None]
    rows, columns = sizes.body_shape
    aspect = extents.new_tensor([shape[1] / shape[0] for shape in shapes])[None, :]
    width, height = extents[..., 0] * columns, extents[..., 1] * rows
    width, height = torch.maximum(width, height * aspect), torch.maximum(height, width / aspect)
    half = torch.stack([width / columns, height / rows], 2) * factor / 2
    return torch.cat([centers - half, centers + half], 2).detach()


def _unflipped(features: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and joints of a left hand as they lie in the image."""
    column = features.shape[3] - 1 - places[..., :1]
    return features.flip(3), torch.cat([column, places[..., 1:]], 2)


def _mirrored(poses: Tensor) -> Tensor:
    """Return rotations (N, joints, 6) seen in a mirror: with M = diag(-1, 1, 1), the first two columns of M R M.

    The six numbers are the first two columns of R, in the order (r11, r12, r21, r22, r31, r32).
    Differs: the host mirrors axis and angle, (x, -y, -z), which is the same rotation.
    """
    return poses * poses.new_tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
