"""Direct preference optimisation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset, IterableDataset
from jaxtyping import Array, Float

from easydel.data.faults import DataError, FaultTally, RowFault
from easydel.data.huggingface import HuggingFaceSource
from easydel.data.loader import check_first_rows, make_loader
from easydel.data.packing import Batch, PackingLayout, pack
from easydel.data.preference import PreferencePair, PreferenceTransform
from easydel.data.sources import ShardedDataSource
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import create_mesh, data_parallel_size, mesh_of, put_batch
from easydel.trainers.callbacks import TrainerCallback
from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
from easydel.trainers.direct_preference_optimization_trainer.losses import make_objective
from easydel.trainers.direct_preference_optimization_trainer.reference import reference_state_for
from easydel.trainers.direct_preference_optimization_trainer.scoring import (
    DeviceBatch,
    PairLogps,
    score_in_micro_batches,
)
from easydel.trainers.direct_preference_optimization_trainer.statistics import describe_batch
from easydel.trainers.direct_preference_optimization_trainer.steps import evaluation_step, training_step
from easydel.trainers.trainer import Trainer
from easydel.trainers.trainer_protocol import BatchStatistics, SelfCheckError, TrainerConfigureDataloaderOutput

PreferenceData = Dataset | IterableDataset | ShardedDataSource
# Policy and reference run the same arithmetic on the same batch, so only the order of sums can differ.
FIRST_STEP_TOLERANCE = 1e-3


class DPOTrainer(Trainer):
    """Trainer for direct preference optimisation (Rafailov et al. 2023).

    Args:
      arguments: options; see `DPOConfig`.
      model: the policy to train. It stays usable: the trainer works on a copy.
      reference_model: what the policy is held near; None is the policy as given. May be the same object as `model`.
      processing_class: tokenizer (a `transformers` fast tokenizer or an object with the same few methods).
      train_dataset: rows with "prompt", "chosen" and "rejected" (text, chat messages or token ids); tokenised lazily,
        during iteration.
      eval_dataset: the same for evaluation, or a dict of named sets.
      data_collator: makes the batch from a list of `PreferencePair`; None packs trees.
      callbacks: listeners besides the trackers and the progress bar.

    Attributes:
      processing_class: the tokenizer.
      reference_state: the frozen reference.
      padding_value: token id that fills rows.

    Raises:
      ValueError: an option, the data or the models do not fit together; says what and how to mend it.

    Example:
      >>> config = DPOConfig(beta=0.1, loss_type="sigmoid", max_length=512, learning_rate=5e-6)  # doctest: +SKIP
      >>> trainer = DPOTrainer(config, model, reference_model, tokenizer, preference_dataset)  # doctest: +SKIP
      >>> trainer.train()  # doctest: +SKIP
    """

    arguments: DPOConfig
    progress_metrics: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "pairs_per_second": "pairs/s",
    }

    def __init__(
        self,
        arguments: DPOConfig,
        model: EasyDeLBaseModule | EasyDeLState,
        reference_model: EasyDeLBaseModule | EasyDeLState | None = None,
        processing_class: Any = None,
        train_dataset: PreferenceData | None = None,
        eval_dataset: PreferenceData | Mapping[str, PreferenceData] | None = None,
        data_collator: Callable[[Sequence[PreferencePair]], Batch] | None = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if not isinstance(arguments, DPOConfig):
            raise TypeError(f"arguments is a {type(arguments).__name__}, expected a DPOConfig.")
        if processing_class is None:
            raise ValueError("processing_class is None; pass the model's tokenizer.")
        self.padding_value = _padding_value(arguments, processing_class)
        self.processing_class = processing_class
        self.arguments = arguments
        self.data_collator = data_collator
        self._train_dataset = train_dataset
        self._eval_dataset = eval_dataset
        policy = model.model if isinstance(model, EasyDeLState) else model
        self._row_multiple = (
            data_parallel_size(mesh_of(policy) or create_mesh()) * arguments.gradient_accumulation_steps
        )
        self.tally = FaultTally(arguments.max_dropped_share)
        super().__init__(arguments, model, processing_class, callbacks)
        self.reference_state, self._reference_is_start = reference_state_for(policy, reference_model, self.mesh)
        self._score = jax.jit(
            functools.partial(score_in_micro_batches, micro_batches=arguments.gradient_accumulation_steps)
        )

    def configure_dataloaders(self) -> TrainerConfigureDataloaderOutput:
        """Lazy loaders for the training and evaluation sets; a few rows are looked at, the rest when iterated.

        Raises:
          DataError: the first rows cannot be used.
        """
        arguments = self.arguments
        train, steps, steps_per_epoch = None, None, None
        if self._train_dataset is not None:
            source = _source(self._train_dataset)
            check_first_rows(source, self._transform())
            train = make_loader(
                source,
                self._transform(),
                self._collate,
                batch_size=arguments.total_batch_size,
                tally=self.tally,
                shuffle_seed=arguments.shuffle_seed_train if arguments.shuffle_train_dataset else None,
                num_epochs=arguments.num_train_epochs,
            )
            steps_per_epoch = len(source) / arguments.total_batch_size
            steps = math.ceil(steps_per_epoch * arguments.num_train_epochs)
        sets = self._eval_dataset if isinstance(self._eval_dataset, Mapping) else {"": self._eval_dataset}
        evaluation = {name: self.evaluation_loader(data) for name, data in sets.items() if data is not None}
        return TrainerConfigureDataloaderOutput(train, evaluation, steps, steps_per_epoch)

    def evaluation_loader(self, dataset: PreferenceData) -> Iterable[Batch]:
        """Every good row of a set once, in order."""
        source = _source(dataset)
        check_first_rows(source, self._transform())
        return make_loader(
            source,
            self._transform(),
            self._collate,
            batch_size=self.arguments.eval_batch_size or self.arguments.total_batch_size,
            tally=FaultTally(self.arguments.max_dropped_share),
        )

    def make_steps(self) -> tuple[Callable, Callable]:
        """The pure steps with this configuration's objective."""
        arguments = self.arguments
        objective = make_objective(
            arguments.loss_type,
            beta=arguments.beta,
            label_smoothing=arguments.label_smoothing,
            rpo_alpha=arguments.rpo_alpha,
        )
        shared: dict[str, Any] = {
            "objective": objective,
            "beta": arguments.beta,
            "micro_batches": arguments.gradient_accumulation_steps,
        }
        return (
            functools.partial(training_step, remat=arguments.gradient_checkpointing, **shared),
            functools.partial(evaluation_step, **shared),
        )

    def prepare_batch(self, state: EasyDeLState, batch: DeviceBatch) -> DeviceBatch:
        """Add the reference's log-probs where the data did not bring them."""
        if "ref_chosen_logps" in batch:
            return batch
        logps = self._score_reference(batch)
        return batch | {"ref_chosen_logps": logps.chosen, "ref_rejected_logps": logps.rejected}

    def compute_reference_log_probs(
        self, state: EasyDeLState, padded_batch: Mapping[str, Any]
    ) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
        """Summed log-probabilities of a batch's completions under the reference, in nats, float32.

        Args:
          state: scored in the reference's place where there is no `reference_state`.
          padded_batch: a batch of this trainer's collate functions.

        Returns:
          ``(chosen, rejected)``, one entry a pair, in the order the pairs were given to the collate function.
        """
        del state
        batch = put_batch({key: np.asarray(value) for key, value in padded_batch.items()}, self.mesh)
        with jax.set_mesh(self.mesh):
            logps = self._score_reference(batch)
        order = np.asarray(padded_batch["pair_order"])
        places = np.argsort(order[order >= 0])
        chosen, rejected = (jnp.asarray(np.asarray(side)[order >= 0][places]) for side in logps)
        return chosen, rejected

    def create_grain_collect_function(
        self, max_sequence_length: int, truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """A function for ``batch_fn`` of a Grain pipeline: a list of rows -> one batch.

        Args:
          max_sequence_length: most tokens of prompt and completion together.
          truncation_mode: which end of an over-long prompt survives.

        Raises:
          DataError: from the function, when a row cannot be used; it has no place to count dropped rows.
        """
        transform = self._transform(max_length=max_sequence_length, truncation_mode=truncation_mode)
        return functools.partial(collate_rows, transform=transform, collate=self._collate)

    def check_first_step(self, metrics: Mapping[str, Any]) -> None:
        """A reference that is the policy's own start must give margin 0 at the first step.

        Raises:
          SelfCheckError: it does not, so something scores the two differently.
        """
        margin = float(metrics["rewards/margins"]) / self.arguments.beta
        if self._reference_is_start and not abs(margin) <= FIRST_STEP_TOLERANCE:
            raise SelfCheckError(
                f"self-check failed: policy and reference are the same model before the first update, but their "
                f"log-ratio margin is {margin:.3g} nats, not 0 (loss {float(metrics['loss']):.6f}). If the data brings "
                "ref_chosen_logps and ref_rejected_logps, they were made by another model, template or truncation."
            )

    def batch_statistics(self, batch: Batch) -> BatchStatistics:
        """Tokens, padding and lengths of a batch."""
        return describe_batch(batch, self.state.model, sum(self.tally.dropped.values()))

    def _score_reference(self, batch: DeviceBatch) -> PairLogps:
        return self._score(self.reference_state.model, batch)

    def _transform(self, **overrides: Any) -> PreferenceTransform:
        arguments = self.arguments
        options = {
            "max_length": arguments.max_length,
            "max_prompt_length": arguments.max_prompt_length,
            "max_completion_length": arguments.max_completion_length,
            "truncation_mode": arguments.truncation_mode,
            "tools": arguments.tools,
            "chat_template_kwargs": arguments.chat_template_kwargs,
        }
        return PreferenceTransform(self.processing_class, **(options | overrides))

    def _collate(self, pairs: Sequence[PreferencePair]) -> Batch:
        if self.data_collator is not None:
            return self.data_collator(pairs)
        return pack(
            pairs,
            PackingLayout(
                padding_value=self.padding_value,
                packing=self.arguments.packing,
                share_prompt=self.arguments.share_prompt,
                row_multiple=self._row_multiple,
            ),
        )


def collate_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    transform: PreferenceTransform,
    collate: Callable[[Sequence[PreferencePair]], Batch],
) -> Batch:
    """Tokenise rows and make one batch of them; a row that cannot be used is an error."""
    pairs = []
    for index, row in enumerate(rows):
        pair = transform(row, index)
        if isinstance(pair, RowFault):
            raise DataError(f"row {index} of the batch: {pair.message}")
        pairs.append(pair)
    return collate(pairs)


def _source(data: PreferenceData) -> ShardedDataSource:
    return data if isinstance(data, ShardedDataSource) else HuggingFaceSource(data)


def _padding_value(arguments: DPOConfig, processing_class: Any) -> int:
    if arguments.padding_value is not None:
        return arguments.padding_value
    if processing_class.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no pad token and padding_value is None. Set padding_value in DPOConfig to any token id "
            "(padding is never read, so the end-of-text id will do), or tokenizer.pad_token."
        )
    return processing_class.pad_token_id
