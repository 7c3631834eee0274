"""The shape of a decoder, whatever family it comes from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from easydel.ops.rotary import RotaryScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class EasyDeLBaseConfig:
    """What a decoder-only model needs to know about itself, in the names of Hugging Face's ``config.json``.

    A family file reads it from ``config.json``; it is hashable, so that a model can carry it as static data.
    `layer_windows` holds one sliding window a layer, in tokens, or None for full attention. `hf_config` keeps the
    whole original as JSON text, so that `save_pretrained` gives back every key it was given.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RotaryScaling | None
    tie_word_embeddings: bool
    layer_windows: tuple[int | None, ...]
    max_position_embeddings: int
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    # Not compared: two models of one shape are alike whatever else their files say.
    hf_config: str = dataclasses.field(default="{}", compare=False)


class HuggingFaceConfig:
    """A ``config.json`` being read: every error names the field and the file's model type."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = dict(raw)

    def require(self, field: str) -> Any:
        """A field without which there is no model."""
        value = self.raw.get(field)
        if value is None:
            raise ValueError(f'config.json of model_type "{self.raw.get("model_type")}" lacks "{field}".')
        return value

    def get(self, field: str, default: Any) -> Any:
        """A field, or `default` when it is absent or null."""
        value = self.raw.get(field)
        return default if value is None else value

    def reject(self, field: str, *accepted: Any) -> None:
        """Refuse a value that the decoder would otherwise silently ignore."""
        value = self.raw.get(field)
        if value is not None and value not in accepted:
            raise ValueError(
                f'config.json has "{field}": {json.dumps(value)}, which this decoder does not compute; '
                f"it accepts {', '.join(map(json.dumps, accepted))}."
            )

    def rotary(self) -> tuple[float, RotaryScaling | None]:
        """Base and scaling, from ``rope_theta``/``rope_scaling`` or the newer ``rope_parameters``."""
        rope = self.get("rope_parameters", None) or self.get("rope_scaling", None) or {}
        theta = float(rope.get("rope_theta") or self.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        for place in (rope, self.raw):
            if place.get("partial_rotary_factor", 1.0) not in (None, 1.0):
                raise ValueError(
                    f'config.json has "partial_rotary_factor": {place["partial_rotary_factor"]}; '
                    "this decoder turns whole heads only."
                )
        if kind == "default":
            return theta, None
        if kind not in ("linear", "llama3"):
            raise ValueError(f'config.json asks for rope_type "{kind}"; supported are default, linear and llama3.')
        if "factor" not in rope:
            raise ValueError(f'config.json asks for rope_type "{kind}" without a "factor".')
        fields = {f.name for f in dataclasses.fields(RotaryScaling)}
        return theta, RotaryScaling(
            **{key: value for key, value in rope.items() if key in fields} | {"rope_type": kind}
        )

    def decoder(self, **family: Any) -> EasyDeLBaseConfig:
        """The fields that every family shares, plus what the `family` file says."""
        self.reject("hidden_act", "silu", "swish")
        heads, layers = self.require("num_attention_heads"), self.require("num_hidden_layers")
        theta, scaling = self.rotary()
        return EasyDeLBaseConfig(
            **{
                "vocab_size": self.require("vocab_size"),
                "hidden_size": self.require("hidden_size"),
                "intermediate_size": self.require("intermediate_size"),
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": self.get("num_key_value_heads", heads),
                "head_dim": self.get("head_dim", self.require("hidden_size") // heads),
                "rms_norm_eps": self.get("rms_norm_eps", 1e-6),
                "rope_theta": theta,
                "rope_scaling": scaling,
                "tie_word_embeddings": self.get("tie_word_embeddings", False),
                "layer_windows": (None,) * layers,
                "max_position_embeddings": self.get("max_position_embeddings", 2048),
                "initializer_range": self.get("initializer_range", 0.02),
                "hf_config": json.dumps(self.raw),
            }
            | family
        )
