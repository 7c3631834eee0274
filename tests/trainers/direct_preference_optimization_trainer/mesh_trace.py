"""Run by test_mesh.py in a process of its own: the same run on several meshes, as JSON on standard output."""

import json
import sys

import jax
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer
from easydel.infra.mesh import create_mesh, parameter_path
from easydel.modules.llama import LlamaForCausalLM
from tests.tiny import make_rows, make_tokenizer, tiny_config

METRICS = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm")


def trace(model: LlamaForCausalLM, **options) -> dict:
    config = DPOConfig(total_batch_size=4, learning_rate=1e-2, save_directory=None, progress_bar=False, **options)
    trainer = DPOTrainer(config, model, None, make_tokenizer(), Dataset.from_list(make_rows()))
    log = trainer.train().log_history
    weight = trainer.state.model.layers.mlp.up_proj.weight
    return {name: [line[f"train/{name}"] for line in log] for name in METRICS} | {
        "spec": str(weight.sharding.spec),
        "reference_spec": str(trainer.reference_state.model.layers.mlp.up_proj.weight.sharding.spec),
        "moment_specs": [
            str(leaf.sharding.spec) for leaf in jax.tree.leaves(trainer.state.opt_state) if leaf.shape == weight.shape
        ],
        "share": weight.addressable_shards[0].data.size / weight.size,
    }


def trace_of_adapters(model: LlamaForCausalLM) -> dict:
    config = DPOConfig(total_batch_size=4, learning_rate=3e-2, lora_rank=4, save_directory=None, progress_bar=False)
    trainer = DPOTrainer(config, model, None, make_tokenizer(), Dataset.from_list(make_rows()))
    log = trainer.train().log_history
    specs = {
        parameter_path(path).rpartition("layers.")[2]: str(leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.model)
    }
    return {name: [line[f"train/{name}"] for line in log] for name in METRICS} | {
        "specs": {name: spec for name, spec in specs.items() if "up_proj" in name or "down_proj" in name},
        "moments_agree": all(
            str(leaf.sharding.spec) == specs[parameter_path(path).rpartition("layers.")[2]]
            for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.state.opt_state)
            if leaf.ndim
        ),
        "base_is_shared": all(
            x is y for x, y in zip(jax.tree.leaves(trainer.model.without_lora()), jax.tree.leaves(model))
        ),
    }


if __name__ == "__main__":
    model = LlamaForCausalLM.init(tiny_config(), jax.random.key(0))
    one_device = create_mesh((1, 1, 1, 1, 1), jax.devices()[:1])
    results = {"one device": trace(model.shard(one_device))}
    for name, dims in json.loads(sys.argv[1]).items():
        results[name] = trace(model.shard(create_mesh(dims)))
    factored = {"optimizer": "adafactor", "extra_optimizer_kwargs": {"min_dim_size_to_factor": 8, "momentum": 0.9}}
    for name, mesh in {"one device": one_device, "fsdp x tp": create_mesh((1, 4, 1, 2, 1))}.items():
        results[f"adapters, {name}"] = trace_of_adapters(model.shard(mesh))
        results[f"adafactor, {name}"] = trace(model.shard(mesh), **factored)
    quantized = model.shard(create_mesh((1, 4, 1, 2, 1))).quantize().layers.mlp
    results["int8 specs"] = {
        f"{name}.{part}": str(getattr(getattr(quantized, name).weight, part).sharding.spec)
        for name in ("up_proj", "down_proj")
        for part in ("values", "scale")
    }
    print(json.dumps(results))
