"""Generate the trained model's answers to some prompts at every evaluation, to read beside its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from easydel.data.tree import PreferencePair
from easydel.trainers.callbacks.callback import RunningTrainer, Watcher
from easydel.trainers.run.metrics_log import is_log_line

SAMPLES_FILE = "samples.jsonl"


class SampleAnswers(Watcher):
    """Generates the model's answers to some prompts at every evaluation, greedily.

    Each answer is a line of ``samples.jsonl`` in the run folder and an entry of `history`: the ``step``, the ``set``
    the prompt is from, ``prompt`` and ``answer`` as text.

    Args:
      pairs: rows whose prompts are answered, by the name of their set.
      tokenizer: decodes answers; its EOS token ends one.
      max_new_tokens: most tokens of an answer.
    """

    def __init__(self, pairs: Mapping[str, Sequence[PreferencePair]], tokenizer: Any, max_new_tokens: int):
        self._prompts = [(name, pair.prompt_ids.tolist()) for name, members in pairs.items() for pair in members]
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self.history: list[dict[str, Any]] = []

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        """Remove the answers after the checkpoint of a resumed run, which generates them again."""
        path = None if trainer.run_folder is None else trainer.run_folder / SAMPLES_FILE
        if path is not None and path.exists():
            step = int(trainer.state.step)
            # Only "\n" ends a line: an answer may hold other characters that count as line ends.
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            new = path.with_name(f"{SAMPLES_FILE}.new")
            new.write_text("".join(f"{line}\n" for line in lines if _is_of(line, step)), encoding="utf-8")
            new.replace(path)

    def on_evaluate(self, trainer: RunningTrainer, metrics: dict[str, float]) -> None:
        """Generate all answers in one call, and append them to history and file."""
        stop = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        answers = trainer.model.generate(
            [prompt for _, prompt in self._prompts], max_new_tokens=self._max_new_tokens, stop_token_ids=stop
        )
        lines = [
            {
                "step": int(trainer.state.step),
                "set": name,
                "prompt": self._tokenizer.decode(prompt),
                "answer": self._tokenizer.decode(answer),
            }
            for (name, prompt), answer in zip(self._prompts, answers)
        ]
        self.history += lines
        if trainer.run_folder is not None:
            with (trainer.run_folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _is_of(text: str, last_step: int) -> bool:
    """True if a line is an answer made up to an update; a line that a kill cut short is not."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return is_log_line(line) and line["step"] <= last_step
