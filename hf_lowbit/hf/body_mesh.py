"""BiDRN's network as a model of transformers: whole-body mesh recovery up to the parameters of the body model.

It stops at the regressed parameters: the SMPL-X layer, its losses and its data have licences of their own. There are
no published weights; a new model is random. ``AutoModel`` knows ``model_type="bidrn"`` once this module is imported
(``from hf_lowbit import BiDRNForBodyMesh``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from hf_lowbit.methods.bidrn.modules import BinaryUnit
from hf_lowbit.methods.bidrn.network import LAYERS, BodyMeshNet, Sizes, Style
from hf_lowbit.methods.bidrn.options import BLOCK_RESIDUALS, UnitOptions

_SHAPES = ("body_shape", "hand_shape", "face_shape")


def _list(value: Any) -> Any:
    """Return a tuple as JSON has it; what else a file may hold is refused by name, later."""
    return list(value) if isinstance(value, tuple) else value


class BodyMeshConfig(PreTrainedConfig):
    """Sizes of the network and which of it is binary; the defaults are those of the paper's network.

    Args:
        body_depth, hand_depth, face_depth: 18 or 50.
        width: channels of the stems.
        head_width: channels of the rotation nets and of BoxNet.
        body_shape, hand_shape, face_shape: rows and columns of the images, multiples of 32.
        heat_depth: layers of the joints' heat maps.
        binarize: make the backbones' convolutions binary.
        binarize_box: make BoxNet's transposed convolutions binary.
        block_residual: "fp", "binary" or "none".
        named_modules: use the named modules where shapes change.
        ste, shift, act, lcr, residual_position: of the units, see
            :class:`hf_lowbit.methods.bidrn.options.UnitOptions`.
    """

    model_type = "bidrn"

    def __init__(
        self,
        body_depth: int = 50,
        hand_depth: int = 50,
        face_depth: int = 18,
        width: int = 64,
        head_width: tuple[int, int] = (512, 256),
        body_shape: tuple[int, int] = (256, 192),
        hand_shape: tuple[int, int] = (256, 256),
        face_shape: tuple[int, int] = (192, 192),
        heat_depth: int = 8,
        binarize: bool = True,
        binarize_box: bool = True,
        block_residual: str = "fp",
        named_modules: bool = False,
        ste: str = "poly",
        shift: str = "bias",
        act: str = "rprelu",
        lcr: bool = True,
        residual_position: str = "after_act",
        **kwargs: Any,
    ) -> None:
        self.body_depth, self.hand_depth, self.face_depth = body_depth, hand_depth, face_depth
        self.width, self.head_width, self.heat_depth = width, _list(head_width), heat_depth
        self.body_shape, self.hand_shape, self.face_shape = map(_list, (body_shape, hand_shape, face_shape))
        self.binarize, self.binarize_box, self.block_residual = binarize, binarize_box, block_residual
        self.named_modules, self.ste, self.shift, self.act = named_modules, ste, shift, act
        self.lcr, self.residual_position = lcr, residual_position
        super().__init__(**kwargs)

    @classmethod
    def tiny(cls, **changes: Any) -> BodyMeshConfig:
        """Return a configuration of depth 18 and a quarter of the width, for tests."""
        small: dict[str, Any] = {
            **dict.fromkeys(("body_depth", "hand_depth", "face_depth"), 18),
            **{"width": 16, "head_width": (32, 16), "heat_depth": 4},
            **{"body_shape": (64, 64), "hand_shape": (64, 64), "face_shape": (64, 64)},
        }
        return cls(**{**small, **changes})

    def problems(self) -> list[str]:
        """Return what is wrong with the values, empty if nothing is; a config comes from somebody's file."""
        found = []
        for name in ("body_depth", "hand_depth", "face_depth"):
            if type(getattr(self, name)) is not int or getattr(self, name) not in LAYERS:
                found.append(f"{name} must be one of {', '.join(map(str, LAYERS))}, got {getattr(self, name)!r}")
        for name in ("width", "heat_depth"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 1024:
                found.append(f"{name} must be an integer from 1 to 1024, got {value!r}")
        for name, step in (("head_width", 1), *((name, 32) for name in _SHAPES)):
            pair = getattr(self, name)
            fine = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(v) is int for v in pair)
            if not fine or not all(step <= v <= 8192 and v % step == 0 for v in pair):
                found.append(f"{name} must be two multiples of {step} up to 8192, got {pair!r}")
        for name in ("binarize", "binarize_box", "named_modules"):
            if type(getattr(self, name)) is not bool:
                found.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        try:
            _ = self._unit
        except ValueError as error:
            found.append(str(error))
        if self.block_residual not in BLOCK_RESIDUALS:
            found.append(f"block_residual must be one of {', '.join(BLOCK_RESIDUALS)}, got {self.block_residual!r}")
        return found

    @property
    def sizes(self) -> Sizes:
        """Sizes of the network."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sizes)}
        tuples: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return Sizes(**tuples)

    @property
    def _unit(self) -> UnitOptions:
        return UnitOptions(self.ste, self.shift, self.act, self.lcr, self.residual_position)

    @property
    def style(self) -> Style:
        """Which convolutions are binary, and how."""
        return Style(self.binarize, self.binarize_box, self.block_residual, self.named_modules, self._unit)


@dataclasses.dataclass
class BodyMeshOutput(ModelOutput):
    """Regressed parameters; rotations are the first two columns of a matrix, row by row.

    Attributes:
        root_pose: (N, 6).
        body_pose: (N, 21, 6).
        shape: (N, 10).
        cam: (N, 3).
        lhand_pose, rhand_pose: (N, 15, 6).
        expr: (N, 10).
        jaw: (N, 6).
        joint_img: (N, 65, 3), column, row and depth in steps of the features: body, left hand, right hand.
        box_centers, box_sizes: (N, 3, 2), left hand, right hand, face: (x, y) as shares of the image.
    """

    root_pose: Tensor | None = None
    body_pose: Tensor | None = None
    shape: Tensor | None = None
    cam: Tensor | None = None
    lhand_pose: Tensor | None = None
    rhand_pose: Tensor | None = None
    expr: Tensor | None = None
    jaw: Tensor | None = None
    joint_img: Tensor | None = None
    box_centers: Tensor | None = None
    box_sizes: Tensor | None = None


class BiDRNForBodyMesh(PreTrainedModel):
    """Images to parameters of a whole-body model, with binary convolutions (BiDRN, arXiv 2311.14323)."""

    config_class = BodyMeshConfig
    base_model_prefix = "net"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  as in transformers
    config: BodyMeshConfig

    def __init__(self, config: BodyMeshConfig) -> None:
        """Make the network, with random weights.

        Raises:
            ValueError: the config holds values out of range; all of them are named.
        """
        if problems := config.problems():
            raise ValueError(f"BodyMeshConfig: {'; '.join(problems)}")
        super().__init__(config)
        self.net = BodyMeshNet(config.sizes, config.style)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
            if isinstance(module, BinaryUnit):
                module.reset_unit(init.copy_)  # which leaves what was read from a file
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Regress the parameters.

        Args:
            pixel_values: (N, 3, H, W), normalized; resized to ``body_shape`` for the body, hands and face are cropped
                from it at full resolution.
            return_dict: False for a tuple.

        Returns:
            :class:`BodyMeshOutput`.

        Raises:
            ValueError: ``pixel_values`` has another shape.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or not pixel_values.numel():
            raise ValueError(f"pixel_values must be (N, 3, H, W) and not empty, got {tuple(pixel_values.shape)}")
        out = BodyMeshOutput(**self.net(pixel_values))
        return out.to_tuple() if return_dict is False else out


AutoConfig.register("bidrn", BodyMeshConfig, exist_ok=True)
AutoModel.register(BodyMeshConfig, BiDRNForBodyMesh, exist_ok=True)
