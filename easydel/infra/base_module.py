"""Load, save, adapt and sample any language model, by methods on top of `LanguageModel`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easydel.errors import shown
from easydel.inference import generation
from easydel.infra.base_config import hugging_face_keys
from easydel.infra.base_state import EasyDeLState
from easydel.infra.config_keys import is_harmless
from easydel.infra.language_model import LanguageModel
from easydel.infra.mesh import create_mesh, tree_shardings
from easydel.layers import lora, quantize
from easydel.layers.lora import split_trainable
from easydel.layers.surgery import layer_linears
from easydel.ops.attention.tree_attention import AttentionBackend
from easydel.weights import peft
from easydel.weights.hugging_face import CheckpointFiles, write_folder
from easydel.weights.pretrained import (
    check_layer_count,
    float_dtype,
    load_parameters,
    open_checkpoint,
    tensors_to_keep,
    tensors_to_save,
)


class EasyDeLBaseModule(LanguageModel):
    """A language model that loads, saves, generates and takes adapters."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> Self:
        """Load a Hugging Face folder, a hub id or a ``.gguf`` file.

        Args:
          name_or_path: folder, ``org/name`` or file.
          **options: those of `from_checkpoint`.

        Raises:
          FileNotFoundError: there is no such model.
          ValueError: the files do not hold a model of this family; says which tensor or field is wrong.

        Example:
          >>> model = LlamaForCausalLM.from_pretrained("path/to/model", sharding_axis_dims=(1, -1, 1, 1, 1))
          >>> model.model_type
          'llama'
        """
        return cls.from_checkpoint(open_checkpoint(name_or_path), **options)

    @classmethod
    def from_checkpoint(
        cls,
        files: CheckpointFiles,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        sharding_axis_dims: Sequence[int] = (1, -1, 1, 1, 1),
        attention_backend: AttentionBackend | None = None,
    ) -> Self:
        """Load from opened files; each device reads its own slices.

        Args:
          files: the tensors and the config.
          dtype: compute dtype, float32, bfloat16 or float16 (which is not trained in); None is float32 on CPU and
            bfloat16 on accelerators.
          param_dtype: dtype the parameters are kept in. Keep float32 for training: updates of DPO's size are lost to
            rounding in bfloat16 weights.
          sharding_axis_dims: sizes of the mesh axes ``("dp", "fsdp", "ep", "tp", "sp")``, one may be -1.
          attention_backend: backend of attention over whole rows, "cudnn", "tpu" or "xla"; None chooses by device,
            dtype and head size. All give the same numbers up to rounding.

        Raises:
          ValueError: the files do not hold a model of this family, or an option has another value than these.
        """
        found = files.config.get("model_type")
        if found != cls.model_type:
            raise ValueError(
                f'{cls.__name__} reads model_type "{cls.model_type}", config.json says {shown(found)}; '
                "AutoEasyDeLModelForCausalLM picks the class by itself."
            )
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        dtype, param_dtype = float_dtype("dtype", dtype), float_dtype("param_dtype", param_dtype)
        check_layer_count(files, cls.layer_prefix)
        config = dataclasses.replace(
            cls.read_config(files.config), kept_files=files.kept_files, source=str(files.path.absolute())
        )
        skeleton = jax.eval_shape(lambda: cls.init(config, jax.random.key(0), dtype))
        skeleton = dataclasses.replace(skeleton, attention_backend=attention_backend)
        mesh = create_mesh(sharding_axis_dims)
        return load_parameters(files, skeleton, cls.weight_map_for(config), cls.partition_rules, mesh, param_dtype)

    def save_pretrained(self, folder: str | Path, *, dtype: Any = None, max_shard_size: str = "5GB") -> None:
        """Write a Hugging Face folder (``config.json``, safetensors) that `transformers` opens.

        Adapters are merged into the weights, and quantised weights are written in the dtype they were made from.
        ``config.json`` is the one that the model was loaded with, and ``generation_config.json`` and the license texts
        of its folder are kept; other files (the model card, code) describe the original and are left out. Where that
        folder holds more than the language model (a vision tower), its other tensors are read again and kept.

        Args:
          folder: the folder to write to, made if absent. The caller saves the tokenizer beside the model.
          dtype: dtype of the tensors on disk; None keeps the parameters' own, so that nothing is rounded away.
          max_shard_size: largest file, e.g. "5GB".

        Raises:
          ValueError: the config was changed to something that the family's ``config.json`` cannot express.
        """
        own_dtype = None if dtype is None else float_dtype("dtype", dtype)
        tensors = tensors_to_save(self.merge_lora(), self.weight_map, own_dtype)
        config = self._hugging_face_config()
        # transformers 5 writes "dtype", older files "torch_dtype"; both versions read the older name.
        config["dtype" if "dtype" in config else "torch_dtype"] = str(next(iter(tensors.values())).dtype)
        if self.weight_map.is_wrapped and self.config.source is not None:
            tensors |= tensors_to_keep(self.config.source, self.weight_map)
        write_folder(folder, config, tensors, max_shard_size, self.config.kept_files)

    def _hugging_face_config(self) -> dict[str, Any]:
        """The ``config.json`` that the model came with, where it still describes the model, else a new one."""
        original = json.loads(self.config.hf_config)
        if self._is_said_by(original):
            return original
        made = {"architectures": [type(self).__name__], "model_type": self.model_type}
        made |= hugging_face_keys(self.config) | self.family_keys(self.config)
        made |= {name: value for name, value in original.items() if is_harmless(name) and name not in made}
        if not self._is_said_by(made):
            raise ValueError(
                f"config.json of model_type {self.model_type} cannot say what this model's config is: {self.config}."
            )
        return made

    def _is_said_by(self, raw: Mapping[str, Any]) -> bool:
        try:
            return raw.get("model_type") == self.model_type and self.read_config(raw) == self.config
        except ValueError:
            return False

    def to_state(self, tx: optax.GradientTransformation | None = None) -> EasyDeLState[Self]:
        """This model with a step counter and, given an optimiser, its state."""
        return EasyDeLState.create(self, tx)

    def shard(self, mesh: Mesh) -> Self:
        """The same model laid out on `mesh` by the family's rule table."""
        return jax.device_put(self, tree_shardings(self, self.partition_rules, mesh))

    def apply_lora_to_layers(
        self, rank: int, alpha: float | None = None, pattern: str | None = None, **options: Any
    ) -> Self:
        """The same weights with fresh adapters on the layers that match; see `easydel.layers.lora.apply_lora`.

        Example:
          >>> model.apply_lora_to_layers(rank=8, alpha=16, pattern="q_proj|v_proj").has_lora
          True
        """
        return lora.apply_lora(self, rank, alpha, pattern, **options)

    def merge_lora(self) -> Self:
        """A plain model with the adapters added into the weights, in float32; untouched arrays are shared.

        Quantised weights come back in the dtype they were made from.
        """
        return lora.merge(self)

    def without_lora(self) -> Self:
        """The model with adapters off, sharing every other array."""
        return lora.without_adapters(self)

    def quantize(self, pattern: str | None = None) -> Self:
        """The model with its layers' weights in 8 bits, to train adapters beside; see `easydel.layers.quantize`."""
        return quantize.quantize(self, pattern)

    @property
    def is_quantized(self) -> bool:
        """Whether any layer's weight is kept in 8 bits; such a model is trained by its adapters only."""
        return quantize.is_quantized(self)

    def save_adapter(self, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
        """Write the adapters alone, in PEFT's format; see `easydel.weights.peft.save_adapter`."""
        peft.save_adapter(self, folder, base_model_name_or_path)

    def load_adapter(self, folder: str | Path) -> Self:
        """This model with the adapters of a PEFT folder; see `easydel.weights.peft.load_adapter`."""
        return peft.load_adapter(self, folder)

    @property
    def has_lora(self) -> bool:
        """Whether any layer has an adapter; then only the adapters are trained."""
        return bool(lora.adapters(self))

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Continue prompts of token ids; `options` are those of `easydel.inference.generation.generate`."""
        return generation.generate(self, prompts, **options)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, adapters included; a tied head counts once."""
        return _size(self)

    @property
    def num_trainable_parameters(self) -> int:
        """Number of parameters that training changes: those of the adapters, or all where there are none."""
        return _size(split_trainable(self)[0])

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass through the layers' weights and adapters.

        Each weight costs two (multiply, add). Attention scores, which depend on length, and the head, which only scored
        tokens reach, are not counted.
        """
        return 2 * self._sizes_in_use()[0]

    @property
    def training_flops_per_token(self) -> int:
        """`flops_per_token` of a training step: forward, the gradient of the input, and that of trained weights."""
        everything, adapters = self._sizes_in_use()
        return 4 * everything + 2 * (adapters or everything)

    def _sizes_in_use(self) -> tuple[int, int]:
        """Matrix entries that one token is multiplied by: of all matrices of the layers, and of the adapters alone."""
        everything, adapters, share_in_use = 0.0, 0.0, self.share_in_use
        for path, linear in layer_linears(self).items():
            share = share_in_use(path)
            everything += share * linear.matrix_size
            adapters += share * (linear.lora.matrix_size if linear.lora is not None else 0)
        return round(everything), round(adapters)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
