"""What a training step takes of memory on a device, by the compiler's own account of the program."""

from __future__ import annotations

import gc
from typing import Any

import jax
import numpy as np
import pytest
from datasets import Dataset

from easydel import DPOConfig, DPOTrainer, TrainerCallback
from easydel.infra.mesh import put_batch
from easydel.layers.lora import split_trainable
from easydel.modules.llama import LlamaForCausalLM
from tests.tiny import make_tokenizer, tiny_config

FLOAT = 4
DEVICES = jax.device_count()
pytestmark = pytest.mark.devices


def rows_of(pairs: int, completion: int) -> Dataset:
    """Pairs of token ids, every completion of the same length."""
    rng = np.random.default_rng(0)
    lengths = {"prompt": 4, "chosen": completion, "rejected": completion}
    return Dataset.from_list(
        [{name: rng.integers(3, 50, size).tolist() for name, size in lengths.items()} for _ in range(pairs)]
    )


def trainer_of(
    pairs: int = 4, completion: int = 16, model: dict[str, Any] | None = None, reference=None, **options
) -> DPOTrainer:
    """A trainer whose update is all pairs, each in a row of its own, so that attention stays small."""
    shape = tiny_config(initializer_range=0.02, **(model or {}))
    config = DPOConfig(
        **(
            {
                "total_batch_size": pairs,
                "learning_rate": 1e-3,
                "max_length": None,
                "max_prompt_length": None,
                "packing": False,
                "save_directory": None,
                "progress_bar": False,
            }
            | options
        )
    )
    policy = LlamaForCausalLM.init(shape, jax.random.key(0))
    return DPOTrainer(config, policy, reference, make_tokenizer(), rows_of(pairs, completion))


def memory_of(trainer: DPOTrainer) -> tuple[Any, dict[str, jax.Array]]:
    """The compiler's account of the training step, and the batch it was made for."""
    batch = next(iter(trainer.dataloaders.train))
    with jax.set_mesh(trainer.mesh):
        prepared = trainer.prepare_batch(trainer.state, batch, put_batch(batch, trainer.mesh))
        lowered = trainer.functions.sharded_training_step_function.lower(trainer.state, prepared)
    return lowered.compile().memory_analysis(), prepared


def size_of(tree: Any) -> int:
    """Bytes on one device, as the compiler counts; all devices hold as much."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def temporary(trainer: DPOTrainer) -> int:
    return memory_of(trainer)[0].temp_size_in_bytes


def test_the_peak_does_not_grow_with_sequence_times_vocabulary():
    """Four times the completion tokens: what is added is far less than their logits, one number a token and word."""
    vocabulary = 16384
    few, many = (temporary(trainer_of(pairs, 64, {"vocab_size": vocabulary}, reference_free=True)) for pairs in (8, 32))
    logits = (32 - 8) * 2 * 64 * vocabulary * FLOAT
    print(f"{(many - few) / 1e6:.1f} MB more; the logits of these tokens are {logits / 1e6:.1f} MB")
    assert many - few < 0.2 * logits


def test_the_peak_does_not_grow_with_the_batch():
    """What goes through the model at once is `micro_batch_tokens`, however many pairs an update has."""
    (few, few_pairs), (many, many_pairs) = (
        memory_of(trainer_of(pairs, 16, reference_free=True, micro_batch_tokens=128)) for pairs in (16, 128)
    )
    # Token ids and the like, laid out by parts; several devices write them down twice.
    batch = size_of(many_pairs) - size_of(few_pairs)
    copies = 1.2 if DEVICES == 1 else 2.0
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < copies * batch < few.temp_size_in_bytes


def test_micro_batches_add_to_one_gradient():
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "layer_windows": (None,) * 8}
    trainer = trainer_of(64, 16, shape, reference_free=True, micro_batch_tokens=128)
    weights = size_of(trainer.model)
    # Where the weights are split over devices, a layer of them is gathered, forward and backward, and its gradient.
    gathered = 0 if DEVICES == 1 else 3 * weights * DEVICES / shape["num_hidden_layers"]
    print(f"{temporary(trainer) / weights:.2f} times the weights, of which {gathered / weights:.2f} gathered")
    assert temporary(trainer) - gathered < 1.5 * weights


def test_the_peak_grows_by_a_chunk_of_logits_with_the_vocabulary():
    pairs, completion, (small, large) = 32, 64, (4096, 16384)
    found = [
        temporary(trainer_of(pairs, completion, {"vocab_size": size}, reference_free=True)) for size in (small, large)
    ]
    of_a_word = (found[1] - found[0]) / (large - small) / FLOAT
    tokens, chunk, hidden = pairs * 2 * completion, 256, 32
    print(f"{of_a_word:.0f} numbers a word; a chunk has {chunk} tokens, the batch {tokens}")
    # Beside the chunk's logits and their gradient there are gradients of the embedding, as input and as head.
    assert of_a_word < 3 * chunk + 6 * hidden < tokens


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_the_state_is_updated_in_place(options):
    trainer = trainer_of(**options)
    memory, _ = memory_of(trainer)
    trained = size_of((split_trainable(trainer.state.model)[0], trainer.state.opt_state, trainer.state.step))
    assert memory.alias_size_in_bytes >= trained
    # What comes out besides are a few metrics; the frozen weights do not.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


def test_with_cached_log_probs_there_is_no_second_set_of_weights():
    """Not among what the compiled step is given, and not in memory once all log-probs are known."""
    shape = {"vocab_size": 4096}
    embedding = (4096, 32)

    class Count(TrainerCallback):
        def on_train_begin(self, trainer):
            gc.collect()
            self.found = sum(array.shape == embedding for array in jax.live_arrays())

    gc.collect()
    before = sum(array.shape == embedding for array in jax.live_arrays())
    trainer = trainer_of(
        model=shape,
        reference=LlamaForCausalLM.init(tiny_config(**shape), jax.random.key(1)),
        precompute_ref_log_probs=True,
    )
    count = Count()
    trainer.add_callback(count)
    trainer.train()
    # The weights and two moments; neither the reference nor the model as it was given.
    assert count.found - before == 3
    memory, batch = memory_of(trainer)
    assert memory.argument_size_in_bytes - size_of((trainer.state, batch)) < 1000


def test_with_checkpointing_a_layer_more_costs_its_input_and_what_attention_gives():
    def of_a_layer(gradient_checkpointing: bool) -> float:
        """Numbers a token that one more layer keeps, its own gradients left out."""
        sizes, trainers = (2, 10), []
        for layers in sizes:
            model = {"num_hidden_layers": layers, "layer_windows": (None,) * layers}
            options = {"gradient_checkpointing": gradient_checkpointing, "micro_batch_tokens": 8192}
            # A pair has 128 tokens, so that neither its row nor attention's blocks have padding.
            trainers.append(trainer_of(16 * DEVICES, 62, model, reference_free=True, **options))
        tokens = first_tokens(trainers[0])
        weights = size_of(trainers[1].model) - size_of(trainers[0].model)
        grown = temporary(trainers[1]) - temporary(trainers[0]) - weights
        return grown / (sizes[1] - sizes[0]) / tokens / FLOAT

    # 4 heads of 8 numbers, and the normalizer of each.
    hidden, attention = 32, 4 * (8 + 1)
    with_it, without = of_a_layer(True), of_a_layer(False)
    print(f"{with_it:.0f} numbers a token and layer with checkpointing, {without:.0f} without")
    assert with_it < 1.1 * (hidden + attention)
    assert without > 3 * (hidden + attention)


def first_tokens(trainer: DPOTrainer) -> int:
    """Tokens of the first update on each device."""
    return next(iter(trainer.dataloaders.train))["input_ids"].size // DEVICES
