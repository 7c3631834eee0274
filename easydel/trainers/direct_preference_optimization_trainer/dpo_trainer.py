"""Train by direct preference optimisation: the task that the loop of `easydel.trainers.trainer` runs.

Read on in this order:

- `dpo_config`: the options; `inputs`: the checks of the trainer's other arguments.
- `scoring`: log-probs of pairs under a model, the same for policy and reference.
- `reference/scorer`: the reference's log-probs, cached by `reference/cache`; `reference/reference`: its weights.
- `preference_loss`: loss and metrics, by the objectives of `objectives/`.
"""

from __future__ import annotations

import datetime
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from easydel.data.batching.collate import Collator, ColumnCollator, RowCollator, refuse_ids_outside
from easydel.data.batching.first_rows import (
    FIRST_ROWS,
    check_first_rows,
    readable_rows,
    refuse_inert_template_options,
)
from easydel.data.batching.loader import PreferenceLoader
from easydel.data.batching.packing import Batch, PackingLayout
from easydel.data.faults import FaultTally, in_quotes
from easydel.data.preference.columns import unread_columns
from easydel.data.preference.template_renderer import shows_time
from easydel.data.preference.transform import PreferenceTransform
from easydel.data.sources.base import ShardedDataSource
from easydel.data.sources.huggingface import HuggingFaceSource
from easydel.data.tree import PreferencePair
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.base_state import EasyDeLState
from easydel.infra.mesh import put_batch
from easydel.layers.lora import join
from easydel.ops.mesh_axes import data_parallel_size
from easydel.trainers.adapted_model import model_of
from easydel.trainers.callbacks.callback import TrainerCallback
from easydel.trainers.direct_preference_optimization_trainer.dpo_config import DPOConfig
from easydel.trainers.direct_preference_optimization_trainer.inputs import (
    padding_value_of,
    refuse_layout_options,
    refuse_log_probs_without_effect,
    tokenizer_of,
    warn_of_length,
)
from easydel.trainers.direct_preference_optimization_trainer.preference_loss import (
    PreferenceLoss,
    check_margin_at_start,
)
from easydel.trainers.direct_preference_optimization_trainer.reference.reference import mix, reference_for, split_moving
from easydel.trainers.direct_preference_optimization_trainer.reference.scorer import (
    ReferenceScorer,
    ReferenceStatistics,
    data_of_run,
    precompute,
)
from easydel.trainers.direct_preference_optimization_trainer.sample_answers import SampleAnswers
from easydel.trainers.direct_preference_optimization_trainer.scoring import ScoringOptions
from easydel.trainers.direct_preference_optimization_trainer.statistics import describe_batch
from easydel.trainers.direct_preference_optimization_trainer.template_time import TEMPLATE_TIME, time_of_run
from easydel.trainers.trainer import Trainer
from easydel.trainers.trainer_protocol import (
    BatchLoader,
    BatchStatistics,
    DeviceBatch,
    TrainerConfigureDataloaderOutput,
    TrainerOutput,
)
from easydel.weights.fingerprint import model_digest

if TYPE_CHECKING:
    # Who passes such an object has imported the package; others need not wait a second for it.
    from datasets import Dataset, IterableDataset

    PreferenceData = Dataset | IterableDataset | ShardedDataSource

logger = logging.getLogger("easydel")


class DPOTrainer(Trainer):
    """Trainer for direct preference optimisation (Rafailov et al. 2023).

    Args:
      arguments: options; see `DPOConfig`.
      model: the policy to train. It stays usable: the trainer works on a copy.
      reference_model: what the policy is held near; None is the initial policy. May be the same object as `model`.
      processing_class: tokenizer (a `transformers` fast tokenizer or an object with the same few methods), or a
        processor that has one.
      train_dataset: rows with "prompt", "chosen" and "rejected" (text, chat messages or token ids); tokenised lazily,
        during iteration.
      eval_dataset: the same for evaluation, or a dict of named sets.
      data_collator: makes the batch from a list of `PreferencePair`; None packs trees.
      callbacks: called besides the trackers and the progress bar.
      now: the time that a chat template with today's date shows, for every row; None takes the clock's. A resumed run
        keeps the time it began with.

    Attributes:
      processing_class: as given.
      reference_state: the frozen reference; None if the run is reference-free or its objective needs none, if the
        reference is the policy with adapters off, and once its weights were offloaded after precomputing.
      padding_value: token id that fills rows.

    Raises:
      TypeError: `arguments` is no `DPOConfig`, a model is no model, or the tokenizer is none.
      ValueError: an option, the data or the models do not fit together; says what and how to mend it.

    Example:
      >>> config = DPOConfig(total_batch_size=4, learning_rate=1e-3, save_directory=None, progress_bar=False)
      >>> trainer = DPOTrainer(config, model, None, tokenizer, open_source("train.jsonl"))
      >>> log = trainer.train().log_history
      >>> round(log[0]["train/loss"], 4)  # ln 2: policy and reference are still one model
      0.6931
    """

    arguments: DPOConfig
    examples_name: ClassVar[str] = "pairs"
    progress_metrics: ClassVar[Mapping[str, str]] = {
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
        now: datetime.datetime | None = None,
    ):
        if not isinstance(arguments, DPOConfig):
            raise TypeError(f"arguments is a {type(arguments).__name__}, expected a DPOConfig.")
        if processing_class is None:
            raise ValueError("processing_class is None; pass the model's tokenizer.")
        if data_collator is not None:
            refuse_layout_options(arguments)
        if reference_model is not None:
            arguments.check_reference("reference_model has")
            model_of(reference_model, "reference_model")
        policy = model_of(model)
        super().__init__(arguments, policy, processing_class, callbacks)
        self._vocab_size = policy.config.vocab_size
        self._tokenizer = tokenizer_of(processing_class)
        self.padding_value = padding_value_of(arguments, self._tokenizer, self._vocab_size)
        self.data_collator = data_collator
        self._train_dataset = train_dataset
        self._eval_dataset = eval_dataset
        self._unread_columns: set[str] = set()  # those that a warning has named
        self._has_weightless_batch = False
        self._shows_time = shows_time(self._tokenizer, arguments.chat_template_kwargs)
        self._now = now or datetime.datetime.now()
        if self._shows_time:
            self._now = time_of_run(arguments, self._now)
        self.set_up(policy)
        if arguments.sync_ref_model and self.model.is_quantized:
            raise ValueError(
                "sync_ref_model=True moves the reference's weights, but the model is quantised; pass a model that is "
                "not, or set sync_ref_model=False."
            )
        warn_of_length(arguments.max_length, policy)
        if arguments.eval_samples:
            self.add_callback(self._sample_answers())
        reference = None
        if arguments.keeps_reference:
            reference = reference_for(policy, reference_model, self.mesh, self.model)
            if arguments.sync_ref_model:
                reference.let_follow(self.model)
        self._reference = ReferenceScorer(
            reference,
            self.mesh,
            ld_alpha=arguments.ld_alpha,
            count_micro_batches=self.count_micro_batches,
            is_cached=not arguments.sync_ref_model,
        )

    @property
    def reference_state(self) -> EasyDeLState | None:
        return self._reference.state

    @reference_state.setter
    def reference_state(self, state: EasyDeLState) -> None:
        self._reference.state = state

    @property
    def reference_statistics(self) -> ReferenceStatistics:
        """The status of the reference's weights, and its cache hits, misses and passes so far."""
        return self._reference.statistics

    def configure_dataloaders(self) -> TrainerConfigureDataloaderOutput:
        """Lazy loaders for the training and evaluation sets, with optional precomputed reference log-probs.

        The first rows are checked here, the rest during iteration. Ready-made log-probs come with the batches; with
        ``precompute_ref_log_probs``, `train` first runs all batches of these loaders through the reference.

        Raises:
          DataError: the first rows cannot be used.
          ValueError: the training set's length is unknown and `max_training_steps` is None, or an option has no effect
            on this data.
        """
        arguments = self.arguments
        train, steps, steps_per_epoch = None, None, None
        if self._train_dataset is not None:
            train = self._loader(
                self._train_dataset,
                batch_size=arguments.total_batch_size,
                shuffle_seed=arguments.shuffle_seed_train if arguments.shuffle_train_dataset else None,
                shuffle_buffer_size=arguments.shuffle_buffer_size,
                num_epochs=arguments.num_train_epochs,
            )
            arguments.check_order(by_number=not train.is_stream)
            if not train.is_stream:
                steps = -(-len(train) * arguments.num_train_epochs // arguments.total_batch_size)
                steps_per_epoch = len(train) / arguments.total_batch_size
        sets = self._eval_dataset if isinstance(self._eval_dataset, Mapping) else {"": self._eval_dataset}
        evaluation = {name: self.evaluation_loader(data) for name, data in sets.items() if data is not None}
        return TrainerConfigureDataloaderOutput(train, evaluation, steps, steps_per_epoch)

    def evaluation_loader(self, dataset: PreferenceData) -> PreferenceLoader:
        """Make the loader of a set: every good row once, in order."""
        return self._loader(dataset, batch_size=self.arguments.eval_batch_size or self.arguments.total_batch_size)

    def _loader(self, dataset: PreferenceData, **order: Any) -> PreferenceLoader:
        source: ShardedDataSource
        source = dataset if isinstance(dataset, ShardedDataSource) else HuggingFaceSource(dataset)
        share, transform = self.arguments.max_dropped_share, self._transform()
        first = check_first_rows(source, transform, share)
        refuse_ids_outside(first, self._vocab_size)
        if any(pair.ref_chosen_logps is not None for pair in first):
            refuse_log_probs_without_effect(self.arguments)
        rows = [row for _, row in islice(readable_rows(source), FIRST_ROWS)]
        refuse_inert_template_options(rows, transform)
        unread = unread_columns(rows, reads_margin=transform.reads_margin)
        if new := [column for column in unread if column not in self._unread_columns]:
            self._unread_columns.update(new)
            logger.warning("columns of the data that are not read: %s.", in_quotes(new))
        return PreferenceLoader(source, transform, self._collate, max_dropped_share=share, **order)

    def train(self) -> TrainerOutput:
        """Train as `Trainer.train` does; at the end, log which rows were dropped and why."""
        try:
            output = super().train()
        finally:
            self._reference.flush()
        for name, loader in {"train_dataset": self.dataloaders.train, **self.dataloaders.evaluation}.items():
            if isinstance(loader, PreferenceLoader) and loader.tally.dropped:
                logger.warning("%s: %s", name or "eval_dataset", loader.tally.summary())
        return output

    def prepare_run(self) -> None:
        """With ``precompute_ref_log_probs``, score all data with the reference, then offload its weights."""
        arguments = self.arguments
        if not arguments.precompute_ref_log_probs:
            return
        sets = data_of_run(self.dataloaders, self.total_steps, do_eval=arguments.do_eval is not False)
        with jax.set_mesh(self.mesh):
            precompute(self._reference, self.model, sets, self.on_device, show_progress=arguments.progress_bar)

    def run_identity(self) -> dict[str, Any]:
        """`Trainer.run_identity` with the training data and the reference."""
        identity = super().run_identity()
        if isinstance(self.dataloaders.train, PreferenceLoader):
            identity["train_dataset"] = self.dataloaders.train.identity()
        if self._shows_time:
            identity[TEMPLATE_TIME] = self._now.isoformat()
        reference = None if self._reference.is_initial_policy else self.reference_state
        identity["reference_model"] = None if reference is None else model_digest(reference.model)
        if self.arguments.lora_dropout:
            identity["micro_batch_tokens"] = self._micro_batch_tokens
        return identity

    def checkpoint_arrays(self) -> dict[str, Any]:
        """`Trainer.checkpoint_arrays` with the reference where it moves."""
        # A run killed right after this checkpoint must not score again, in another batch, what it has trained on.
        self._reference.flush()
        arrays = super().checkpoint_arrays()
        if self.arguments.sync_ref_model:
            arrays["reference"] = split_moving(self._reference.model(self.model), self.model)[0]
        return arrays

    def restore_arrays(self, arrays: dict[str, Any]) -> None:
        """Set state and reference from arrays that `checkpoint_arrays` returned."""
        super().restore_arrays(arrays)
        if self.arguments.sync_ref_model:
            still = split_moving(self._reference.model(self.model), self.model)[1]
            self.reference_state = EasyDeLState.create(join(arrays["reference"], still))

    def measure(self, sets: Mapping[str, BatchLoader]) -> dict[str, float]:
        """`Trainer.measure`; new log-probs of the reference are stored in the cache."""
        try:
            return super().measure(sets)
        finally:
            self._reference.flush()

    def make_loss(self) -> PreferenceLoss:
        """The loss of this configuration's objective."""
        arguments = self.arguments
        scoring = ScoringOptions(arguments.ld_alpha, with_weight=arguments.use_weighting)
        return PreferenceLoss(arguments.objective, scoring, self.model.dtype)

    def count_micro_batches(self, rows: int, length: int) -> int:
        """The number of micro-batches that the layout makes of a batch of this shape."""
        return self._layout.count_micro_batches(rows, length)

    def prepare_batch(self, state: EasyDeLState, batch: Batch, device_batch: DeviceBatch) -> DeviceBatch:
        """Add the reference's log-probs unless the data brings them."""
        # Give the step the same keys for cache hits and misses: each structure of a batch is compiled separately.
        prepared = {name: value for name, value in device_batch.items() if name != "pair_keys"}
        self._report_if_weightless(batch)
        if "ref_chosen_logps" in batch:
            refuse_log_probs_without_effect(self.arguments)
            return prepared
        if not self.arguments.reads_reference:
            return prepared
        chosen, rejected = self._reference(state.model, batch, device_batch)
        return prepared | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _report_if_weightless(self, batch: Batch) -> None:
        """Warn of the first batch in which every pair has weight 0, since its gradient is 0."""
        if self._has_weightless_batch or batch["pair_weight"][batch["pair_mask"]].any():
            return
        self._has_weightless_batch = True
        logger.warning(
            'every pair of a batch has weight 0, so its loss and gradient are 0 (%s). Leave rows of "weight" 0 out; '
            "further batches of this kind are not named.",
            self.batch_statistics(batch).names,
        )

    def _sample_answers(self) -> SampleAnswers:
        arguments, sets = self.arguments, self.dataloaders.evaluation
        if not sets:
            raise ValueError(f"eval_samples={arguments.eval_samples} has no effect without an eval_dataset; give one.")
        pairs = {
            name: loader.first_pairs(arguments.eval_samples)
            for name, loader in sets.items()
            if isinstance(loader, PreferenceLoader)
        }
        return SampleAnswers(pairs, self._tokenizer, arguments.eval_sample_tokens)

    @property
    def tally(self) -> FaultTally:
        """Rows of the training set seen and dropped, by reason."""
        if not isinstance(self.dataloaders.train, PreferenceLoader):
            raise ValueError("there is no train_dataset, so no rows were counted.")
        return self.dataloaders.train.tally

    def on_step_end(
        self, state: EasyDeLState, metrics: dict[str, Any], step: int
    ) -> tuple[EasyDeLState, dict[str, Any]]:
        """Hook called at the end of each step for reference model sync; what it returns is what is logged.

        Args:
          state: the state after update number `step`.
          metrics: the update's numbers.
          step: updates made, from 1.
        """
        arguments = self.arguments
        if arguments.sync_ref_model and step % arguments.ref_model_sync_steps == 0:
            mixed = mix(state.model, self._reference.model(state.model), arguments.ref_model_mixup_alpha)
            self.reference_state = EasyDeLState.create(mixed)
        return state, metrics

    def compute_reference_log_probs(
        self, state: EasyDeLState, padded_batch: Mapping[str, Any]
    ) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
        """Compute the summed log-probabilities of a batch's completions under the reference, in nats, float32.

        Args:
          state: its model with adapters off is the reference if the reference shares the policy's weights; otherwise
            it is not used.
          padded_batch: a batch of this trainer's collate functions.

        Returns:
          ``(chosen, rejected)``, one entry per pair, in the order the pairs were given to the collate function.

        Raises:
          ValueError: the objective needs no reference, so there is none.
        """
        if not self.arguments.reads_reference:
            raise ValueError(f"there is no reference: loss_type={self.arguments.loss_type!r} needs none.")
        batch = {key: np.asarray(value) for key, value in padded_batch.items()}
        try:
            with jax.set_mesh(self.mesh):
                sides = self._reference(state.model, batch, put_batch(batch, self.mesh))
        finally:
            self._reference.flush()
        order = batch["pair_order"]
        slots = np.argsort(order[order >= 0])
        chosen, rejected = (jnp.asarray(np.asarray(side)[order >= 0][slots]) for side in sides)
        return chosen, rejected

    def create_grain_collect_function(
        self, max_sequence_length: int, truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    ) -> RowCollator:
        """Make the ``batch_fn`` of a Grain pipeline: a list of rows -> one batch; worker processes can run it.

        Args:
          max_sequence_length: most tokens of prompt and completion together; prompts get half of it at most.
          truncation_mode: which end of an over-long prompt survives.

        Raises:
          DataError: from the function, when a row cannot be used: a pipeline has no count of dropped rows.
        """
        transform = self._collect_transform(max_sequence_length, truncation_mode)
        return RowCollator(transform, self._collator)

    def create_tfds_collect_function(
        self, max_sequence_length: int, truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    ) -> ColumnCollator:
        """Make a function for TFDS and ``tf.data``: a dict of columns -> the batch that the Grain function gives.

        Columns are arrays or lists with one entry per row: byte strings, text, token ids or chat messages.

        Args:
          max_sequence_length: most tokens of prompt and completion together; prompts get half of it at most.
          truncation_mode: which end of an over-long prompt survives.

        Raises:
          DataError: from the function, when a row cannot be used.
        """
        return ColumnCollator(self.create_grain_collect_function(max_sequence_length, truncation_mode))

    def _collect_transform(self, max_sequence_length: int, truncation_mode: str) -> PreferenceTransform:
        half = max(1, max_sequence_length // 2)
        return self._transform(
            max_length=max_sequence_length,
            max_prompt_length=min(self.arguments.max_prompt_length or half, half),
            truncation_mode=truncation_mode,
        )

    def check_first_step(self, batch: DeviceBatch, metrics: Mapping[str, Any]) -> None:
        """Check that a reference that is the initial policy gives margin 0 at the first update.

        Log-probs that the data brings may be another model's, so they are not checked.

        Raises:
          SelfCheckError: policy and reference are scored differently.
        """
        if not self._reference.is_initial_policy or "ref_chosen_logps" in batch:
            return
        check_margin_at_start(
            metrics, beta=self.arguments.beta, dtype=self.model.dtype, advice=self._reference.advice()
        )

    def batch_statistics(self, batch: Batch) -> BatchStatistics:
        """Count the pairs, tokens, padding and completion lengths of a batch."""
        return describe_batch(batch, self.state.model, self._layout)

    def _transform(self, **overrides: Any) -> PreferenceTransform:
        arguments = self.arguments
        options = {
            "max_length": arguments.max_length,
            "max_prompt_length": arguments.max_prompt_length,
            "max_completion_length": arguments.max_completion_length,
            "truncation_mode": arguments.truncation_mode,
            "tools": arguments.tools,
            "chat_template_kwargs": arguments.chat_template_kwargs,
            "reads_margin": arguments.objective.needs_margin,
            "now": self._now,
        }
        return PreferenceTransform(self._tokenizer, **(options | overrides))

    def _collate(self, pairs: Sequence[PreferencePair]) -> Batch:
        return self._collator(pairs)

    @functools.cached_property
    def _collator(self) -> Collator:
        return Collator(self._layout, self._vocab_size, self.data_collator)

    @functools.cached_property
    def _layout(self) -> PackingLayout:
        arguments = self.arguments
        return PackingLayout(
            padding_value=self.padding_value,
            packing=arguments.packing and self.data_collator is None,
            share_prompt=arguments.share_prompt,
            row_multiple=data_parallel_size(self.mesh),
            micro_batches=arguments.gradient_accumulation_steps,
            micro_batch_tokens=None if arguments.objective.needs_whole_update else self._micro_batch_tokens,
        )

    @property
    def _micro_batch_tokens(self) -> int:
        """Most tokens of a micro-batch per device: few keep a CPU busy, accelerators need more."""
        given, is_cpu = self.arguments.micro_batch_tokens, self.mesh.devices.flat[0].platform == "cpu"
        return given or (2048 if is_cpu else 8192)
