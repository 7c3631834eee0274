"""Describe the shape of a decoder of any family, and read it from ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from easydel.errors import shown
from easydel.infra.config_keys import LARGEST_INDEX, Key, mapping, number, only, read_keys, switch, whole
from easydel.infra.rotary_config import ROPE_THETA, ROTARY_KINDS, RotaryScaling, RotaryTable, read_rotary

LARGEST_WIDTH = 2**24
ONE_KIND = "layer"
SLIDING, FULL = "sliding_attention", "full_attention"

# The keys that every family reads from config.json; a family overrides those that it reads otherwise.
DECODER_KEYS: dict[str, Key] = {
    "vocab_size": whole(1, LARGEST_INDEX),
    "hidden_size": whole(1, LARGEST_WIDTH),
    "intermediate_size": whole(1, LARGEST_WIDTH),
    "num_hidden_layers": whole(1, 10_000),
    "num_attention_heads": whole(1, 2**16),
    "num_key_value_heads": whole(1, 2**16, default=None, null=None),
    "head_dim": whole(2, 2**16, default=None, null=None),
    "rms_norm_eps": number(1e-12, 1, default=1e-6),
    "initializer_range": number(0, 1, default=0.02),
    "max_position_embeddings": whole(1, LARGEST_INDEX, default=2048),
    "tie_word_embeddings": switch(False),
    "rope_theta": ROPE_THETA,
    "rope_scaling": mapping(),
    "rope_parameters": mapping(),
    # Settings with only one value that this decoder computes.
    "hidden_act": only("silu", "swish"),
    "partial_rotary_factor": only(1.0),
    "attention_dropout": only(0.0),
    "is_causal": only(True),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "use_sliding_window": only(False),
    "sliding_window": only(None),
    "layer_types": Key(
        expected=f'a list of "{FULL}"',
        accepts=lambda value: isinstance(value, list) and all(kind == FULL for kind in value),
        default=None,
        null=None,
    ),
}

# Fields of a config that config.json holds under the same name, unchanged.
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_theta",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EasyDeLBaseConfig:
    """The shape of a decoder-only model, in the names of Hugging Face's ``config.json``; hashable, to be static data.

    The forward pass of all families reads the fields and the properties. A family that computes a property otherwise
    has a config class of its own, with fields in the names of its ``config.json``, and overrides the property.

    Attributes:
      layer_windows: sliding window of each layer in tokens, or None for full attention.
      qkv_bias, attention_output_bias, mlp_bias: whether these projections have biases.
      qk_norm: whether queries and keys are normalised.
      initializer_range: standard deviation of random weights.
      hf_config: the whole original ``config.json``, as JSON text, for `save_pretrained`.
      kept_files: names and texts of the files that go with the weights, for `save_pretrained`.
      source: where the model was loaded from.

    Raises:
      ValueError: the sizes do not fit one another.
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
    # Not compared: two models of one shape are equal whatever else their files say.
    hf_config: str = dataclasses.field(default="{}", compare=False)
    kept_files: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}: every key head serves "
                "equally many query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding rotates pairs of dimensions.")
        if heads * self.head_dim > LARGEST_WIDTH:
            raise ValueError(
                f"num_attention_heads={heads} times head_dim={self.head_dim} is more than {LARGEST_WIDTH}."
            )
        for name in ("layer_windows", "layer_rotary", "layer_kinds"):
            if len(of_layers := getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(of_layers)} entries, expected one for each of "
                    f"num_hidden_layers={self.num_hidden_layers}."
                )
        if not set(self.layer_rotary) <= set(range(len(self.rotary_tables))):
            raise ValueError(
                f"layer_rotary={self.layer_rotary} names more than the {len(self.rotary_tables)} of rotary_tables."
            )

    @property
    def rotary_tables(self) -> tuple[RotaryTable | None, ...]:
        """The rotary tables that layers choose from; None rotates nothing."""
        return (RotaryTable(self.rope_theta, self.rope_scaling),)

    @property
    def layer_rotary(self) -> tuple[int, ...]:
        """The index into `rotary_tables` of each layer."""
        return (0,) * self.num_hidden_layers

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer: those of one kind have parameters of the same shapes, and are stacked together."""
        return (ONE_KIND,) * self.num_hidden_layers

    @property
    def compared_fields(self) -> tuple[str, ...]:
        """The fields by which two models are told apart; the others only keep what their files say."""
        return tuple(field.name for field in dataclasses.fields(self) if field.compare)

    @property
    def layers_of_kind(self) -> dict[str, tuple[int, ...]]:
        """Kind -> the numbers of its layers, from 0."""
        kinds = self.layer_kinds
        return {kind: tuple(number for number, own in enumerate(kinds) if own == kind) for kind in dict.fromkeys(kinds)}

    @property
    def layer_stacks(self) -> dict[str, tuple[int, ...]]:
        """Path of each stack of layers in the model -> the numbers of its layers, from 0."""
        of_kind = self.layers_of_kind
        return {"layers" if len(of_kind) == 1 else f"layers.{kind}": numbers for kind, numbers in of_kind.items()}

    @property
    def attention_scale(self) -> float | None:
        """Factor of the dot product of query and key; None is ``1 / sqrt(head_dim)``."""
        return None

    @property
    def attention_soft_cap(self) -> float | None:
        """``c`` of ``s -> c tanh(s / c)`` for attention's scores; None leaves them as they are."""
        return None

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return 1.0

    @property
    def logit_scale(self) -> float:
        """Factor of the logits, applied before the soft-cap."""
        return 1.0

    @property
    def logit_soft_cap(self) -> float | None:
        """``c`` of ``z -> c tanh(z / c)`` for scaled logits; None leaves them as they are."""
        return None


Config = TypeVar("Config", bound=EasyDeLBaseConfig)


def read_decoder_keys(raw: Mapping[str, Any], family: dict[str, Key]) -> dict[str, Any]:
    """The keys of a decoder's ``config.json`` with those of its family, checked; see `read_keys`."""
    return read_keys(raw, DECODER_KEYS | family, f"config.json of model_type {shown(raw.get('model_type'))}")


def decoder_config(
    config_class: type[Config], raw: Mapping[str, Any], values: Mapping[str, Any], **family: Any
) -> Config:
    """The config that checked `values` of ``config.json`` describe, with the fields that a family sets.

    Args:
      config_class: `EasyDeLBaseConfig`, or a family's own.
      raw: the whole ``config.json``.
      values: the result of `read_decoder_keys`.
      **family: fields of the config that the keys of every family do not decide.

    Raises:
      ValueError: values that contradict one another; names them.
    """
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values["head_dim"]
    if head_dim is None:
        if hidden % heads:
            raise ValueError(
                f'config.json has "hidden_size": {hidden}, which is no multiple of "num_attention_heads": {heads}, '
                'and no "head_dim".'
            )
        head_dim = hidden // heads
    theta, scaling = read_rotary(values)
    return config_class(
        **{
            "vocab_size": values["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": values["intermediate_size"],
            "num_hidden_layers": values["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": values["num_key_value_heads"] or heads,
            "head_dim": head_dim,
            "rms_norm_eps": float(values["rms_norm_eps"]),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": values["tie_word_embeddings"],
            "layer_windows": (None,) * values["num_hidden_layers"],
            "max_position_embeddings": values["max_position_embeddings"],
            "initializer_range": float(values["initializer_range"]),
            "hf_config": json.dumps(dict(raw)),
        }
        | family
    )


def sliding_windows(
    layer_types: Sequence[str] | None, default: Sequence[str], window: int | None
) -> tuple[int | None, ...]:
    """One window per layer from ``layer_types``, or from `default` where there are none.

    Raises:
      ValueError: there is not one type for every layer, or a layer slides and there is no window.
    """
    types = default if layer_types is None else layer_types
    if len(types) != len(default):
        raise ValueError(f'config.json has {len(types)} "layer_types" for "num_hidden_layers": {len(default)}.')
    if window is None and SLIDING in types:
        raise ValueError(
            f'config.json has "{SLIDING}" among its "layer_types" and no window: "sliding_window" is null or '
            '"use_sliding_window" is false.'
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def window_key() -> Key:
    """``sliding_window`` of a family that has one: absence means 4096, as in transformers; null means no window."""
    return whole(1, LARGEST_INDEX, default=4096, null=None)


def layer_types_key() -> Key:
    """``layer_types`` of a family whose layers may have sliding windows."""
    return Key(
        expected=f'a list of "{FULL}" and "{SLIDING}"',
        accepts=lambda value: isinstance(value, list) and all(kind in (FULL, SLIDING) for kind in value),
        default=None,
        null=None,
    )


def hugging_face_keys(config: EasyDeLBaseConfig) -> dict[str, Any]:
    """The keys of every family's ``config.json``, in the spelling that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    kept = ROTARY_KINDS[scaling.rope_type] if scaling is not None else {}
    rope = {"rope_type": scaling.rope_type, **{key: getattr(scaling, key) for key in kept}} if scaling else None
    return {name: getattr(config, name) for name in SAME_NAMES} | {"hidden_act": "silu", "rope_scaling": rope}
