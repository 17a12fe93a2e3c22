"""TRL's online trainer with checkpoints that are whole or absent, and runs that resume bit for bit."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from rsoups.common.errors import DatasetError, TrainingError
from rsoups.common.files import only_run_in, writing
from rsoups.training.callbacks import interruptible
from rsoups.training.checkpoints import finish_checkpoint, last_checkpoint
from rsoups.training.first_step import same_random_numbers

_PARTIAL = ".partial"  # folder in which a checkpoint is written before it gets its name


class ResumableTrainer(GRPOTrainer):
    """GRPOTrainer whose runs can be interrupted at any moment. A subclass writes its own state in `_save_rollout`."""

    args: Any
    _saving = False  # while a checkpoint is written, the output folder is the partial one

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train the adapter.

        On the CPU a resumed run ends with the adapter of an uninterrupted one, bit for bit, wherever it stopped.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True for the newest complete one in `output_dir`, if there is one.
            trial, ignore_keys_for_eval: As in `transformers.Trainer.train`.

        Raises:
            DatasetError: Fewer prompts than one rollout takes.
            OutputError: Another run is training into `output_dir`, or a checkpoint cannot be written.
            TrainingError: The first step's checks fail, or the run diverges.
        """
        self._check_prompts(self.train_dataset)
        folder = str(self.args.output_dir)
        checkpoint: Any = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = last_checkpoint(folder)
        with only_run_in(folder) if self.args.should_save else nullcontext(), interruptible(self):
            return super().train(checkpoint and str(checkpoint), trial, ignore_keys_for_eval)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate. During training, the training's random numbers are the same with and without an evaluation."""
        if not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        with same_random_numbers():
            return super().evaluate(*args, **kwargs)

    def _check_prompts(self, dataset: Any) -> None:
        needed = int(self.args.generation_batch_size or 0) // int(self.num_generations or 1)
        if hasattr(dataset, "__len__") and len(dataset) < needed:
            raise DatasetError(
                f"{len(dataset)} prompts are fewer than one rollout of {needed} needs: add some, or lower "
                "generation_batch_size"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A step with such a gradient would make every weight NaN. (fp16's scaler skips these steps itself.)
        if not self.args.fp16 and not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is {float(norm)} at step {self.state.global_step + 1}. Update skipped; earlier checkpoints are "
                "valid. Lower learning_rate, or normalize the reward"
            )
        return norm

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's sampler, seeded for each epoch: TRL's goes on from the last epoch's state, which a resumed run lacks."""
        s: Any = super()._get_train_sampler(dataset)
        return EpochSampler(s.data_source, s.mini_repeat_count, s.batch_size, s.repeat_count, s.shuffle, s.seed)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / _PARTIAL) if self._saving else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint under a temporary name, and rename it when all processes are done."""
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._saving = True
        try:
            with writing(run / name, "; earlier ones are valid"):
                super()._save_checkpoint(model, trial)
                self._save_rollout(run / _PARTIAL / name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    finish_checkpoint(run / _PARTIAL / name, run / name)
                    best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                    self.state.best_model_checkpoint = str(best) if best.is_dir() else None
                    rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint)
        finally:
            self._saving = False
            if self.args.should_save:
                shutil.rmtree(run / _PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save_rollout(self, folder: Path) -> None:
        """Write the state of the algorithm, on every process, into the checkpoint's folder."""
        raise NotImplementedError


class EpochSampler(RepeatSampler):
    """TRL's RepeatSampler, with an order for each epoch that depends on the seed and the epoch only."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)
