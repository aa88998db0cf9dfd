"""The trainer: `torchrun -m gptcore.train RUN_DIR`, or alone: `python -m gptcore.train --spec FILE`.

Reads `spec.json`, writes events, checkpoints and an export; knows nothing of who started it. A step
reads top to bottom in `Trainer.step`. An attempt's last event says how it ended.
"""

import math
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from gptcore import device as devices
from gptcore import events, guard, hellaswag
from gptcore.checkpoint import Checkpoint, Saver, best_checkpoint, list_checkpoints, set_weights
from gptcore.data import Batch, Prefetcher, Sequence
from gptcore.dataset import Dataset
from gptcore.dist import TRAINING_TIMEOUT, Dist
from gptcore.evaluate import bits_per_byte, val_windows, validation_loss
from gptcore.export import export_model
from gptcore.failure import Diverged, is_out_of_memory
from gptcore.model import GPT
from gptcore.native import native_class
from gptcore.optim import Optimizers, load_optimizer_tensors, optimizer_tensors, set_lr, update
from gptcore.origin import load_origin
from gptcore.plan import Plan, refuse_another_shape
from gptcore.rundir import Attempt, RunDir
from gptcore.sample import sample
from gptcore.scorer import score_ours
from gptcore.spec import TrainSpec, refusal
from gptcore.state import TrainState
from gptcore.tokenizer import load_tokenizer
from gptcore.tracing import Tracer

STOPS = ("", "pause", "cancel", "max_duration")  # as numbers when ranks agree
WARMUP_PASSES = 2  # discarded; after them DDP's buckets are final, so summation order is too


@dataclass
class Trainer:
    """One rank of one attempt: what `gptcore.setup` built, and the loop over it."""

    spec: TrainSpec
    planned: Plan
    dist: Dist
    run: RunDir
    attempt: Attempt
    report: events.Report
    model: GPT  # the plain module: its names are the checkpoint's
    forward: Any  # the same, compiled where asked: tokens, targets (B, T) → mean loss ()
    replica: Any  # the same under DDP where there are several ranks
    compiled: bool
    evaluates_apart: bool  # by a compiled graph of its own, without gradients
    precision: str
    optimizers: Optimizers
    dataset: Dataset
    train_windows: Sequence
    val: Any
    peak_flops: float | None
    hellaswag_items: list[hellaswag.Item]  # none where the spec asks for none
    state: TrainState = field(default_factory=TrainState)
    replayed: dict[int, float] = field(default_factory=dict)  # losses of steps that ran before
    best_before: tuple[float | None, int | None] = (None, None)  # loss and step, until the newest best was found
    signalled: bool = False
    started_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.saver = Saver(self.run, self.spec, self.attempt.number, self.report, self._revert_best)
        self.parameters = list(self.model.parameters())
        trace = self.run.path / "profile" / f"rank-{self.dist.rank}-a{self.attempt.number:04d}.json"
        self.tracer = Tracer(self.spec.profile_steps, trace)
        self.batches = self._prefetcher()

    def _prefetcher(self) -> Prefetcher:
        return Prefetcher(
            self.train_windows, self.dist,
            sequences_per_step=self._sequences_per_step, micro_batch_size=self.planned.micro_batch_size,
        )  # fmt: skip

    # --- the run

    def train(self) -> None:
        """Resume or begin, step until the end or a stop, evaluate, export, finish."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._warm_up()
        self._resume()
        self.dist.limit_waits(TRAINING_TIMEOUT)
        self._phase("training")
        stop = self._step_until_done()
        if stop:
            self.saver.wait(needed=True)  # whoever stops a run is promised a checkpoint of its last step
        self.saver.close()
        if stop:
            self.report(events.Stopped(step=self.state.step, reason=stop))
            return
        self._export()
        state = self.state
        finished = events.Finished(
            step=state.step, tokens=state.tokens, best_step=state.best_step, best_val_loss=state.best_val_loss,
            seconds=time.perf_counter() - self.started_at,
        )  # fmt: skip
        self.report(finished)

    def _step_until_done(self) -> Any:
        """Returns why to stop, or None once all steps are done."""
        if self.state.evaluation_owed:
            self._evaluate()
        if self.state.score_owed:
            self._score_hellaswag()
        self.batches.seek(self.state.position)
        try:
            while self.state.step < self.spec.max_steps:
                self.tracer.before(self.state.step + 1)
                stop = self.step()
                if self.tracer.after(self.state.step):
                    self.report(events.Notice(message=f"trace written to {self.tracer.path}"))
                step, last = self.state.step, self.state.step == self.spec.max_steps
                evaluate, asked = last or step % self.spec.evaluate.every_steps == 0, self.spec.evaluate.hellaswag
                score = asked is not None and (last or step % asked.every_steps == 0)
                if evaluate or stop or step % self.spec.checkpoint.every_steps == 0:
                    self.state.evaluation_owed, self.state.score_owed = evaluate, score
                    self._save()
                if stop:
                    return stop
                if evaluate:
                    self._evaluate()
                if score:
                    self._score_hellaswag()
                if self.spec.sample and (last or step % self.spec.sample.every_steps == 0):
                    self._sample()
                self.saver.poll()
        finally:
            self.tracer.close()  # also one whose last step never came
            self.batches.close()
        return None

    def step(self) -> Any:
        """One optimiser update, or one refused by the guard. Returns why to stop, or None."""
        spec, state, began = self.spec, self.state, time.perf_counter()
        lr = set_lr(self.optimizers, state.step, spec.optim, spec.max_steps)
        loss, data_wait_seconds = self._accumulate_gradients()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm, train_loss, grad_norm, stop = self._agree(loss, get_total_norm(grads))
        refused = guard.judge(state, train_loss, grad_norm, spec.optim.spike_sigmas)
        if refused is None:
            clip = spec.optim.grad_clip
            update(self.optimizers, norm / clip if clip is not None and grad_norm > clip else None)
            guard.accept(state, train_loss, grad_norm)
        self.model.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += spec.tokens_per_step
        state.position += self._sequences_per_step
        if refused is None:
            self._report_step(began, train_loss, lr, grad_norm, data_wait_seconds)
        else:
            self.report(refused)
            if guard.skip(state, train_loss, grad_norm):
                self._roll_back(refused.reason)
        return stop

    def _accumulate_gradients(self) -> tuple[Tensor, float]:
        """Forward and backward over this rank's share of the batch → its mean loss (), seconds waited."""
        steps = self.planned.grad_accum_steps
        loss, waited = torch.zeros((), device=self.dist.device), 0.0
        for micro_step in range(steps):
            asked = time.perf_counter()
            batch = self.batches.take()
            waited += time.perf_counter() - asked
            loss += self._forward_backward(batch, 1 / steps, last=micro_step == steps - 1)
        return loss, waited

    def _forward_backward(self, batch: Batch, share: float, last: bool) -> Tensor:
        """Adds this micro-batch's gradients; the last one of a step averages them over the ranks."""
        if self.dist.world_size > 1:
            # set before the forward pass: DDP reads it there, not in backward
            self.replica.require_backward_grad_sync = last
        with self._autocast():
            loss: Tensor = self.replica(*batch) * share
        loss.backward()
        return loss.detach()

    def _agree(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, float, float, Any]:
        """The gradients' norm, on the device; mean loss over the ranks, the norm once more, why to stop: the step's
        only wait for the device.

        The norm is rank 0's on all ranks. Each has the same averaged gradients, but another kind of GPU may add them up
        in another order, and ranks that clip or refuse differently drift apart for ever. Times zero, the norm of
        another rank that is not finite makes the sum not finite: the update is refused everywhere.
        """
        told = self.attempt.told() if self.dist.first else ""
        code = STOPS.index(told if told in STOPS else "pause")
        # filled on the device: a tensor made of a Python number is copied there, and the copy waits for it
        own_norm = norm.to(loss) * float(self.dist.first)
        words = torch.stack((loss, torch.full_like(loss, code), torch.full_like(loss, self.signalled), own_norm))
        total, code, signals, grad_norm = self.dist.sum(words).tolist()
        return words[3], total / self.dist.world_size, grad_norm, STOPS[int(code)] or ("pause" if signals else None)

    def _on_signal(self, signum: int, frame: object) -> None:
        self.signalled = True

    # --- beginning, and beginning again

    def _roll_back(self, reason: str) -> None:
        """To the last checkpoint's weights and step, and on from the data behind the bad batches."""
        self.dist.run_on_first(self.saver.wait)
        bad, rollbacks = self.state, self.state.rollbacks + 1
        checkpoint = self._newest_checkpoint()
        if checkpoint is None or rollbacks > guard.MAX_ROLLBACKS:
            raise Diverged(
                f"step {bad.step}: {guard.SKIPS_BEFORE_ROLLBACK} updates in a row refused ({reason}), "
                + ("and no checkpoint to go back to" if checkpoint is None else f"after {rollbacks - 1} rollbacks")
                + "; lower lr, lengthen warmup_steps, set grad_clip, or raise spike_sigmas"
            )
        self._load(checkpoint)
        passed_over = (bad.position - self.state.position) // self._sequences_per_step
        self.state.position, self.state.rollbacks = bad.position, rollbacks
        self.state.batches_skipped, self.state.skipped_in_a_row = bad.batches_skipped, 0
        # with the refused values in them, a level that lasts is accepted this time, not refused until the run fails
        self.state.losses, self.state.grad_norms = bad.losses, bad.grad_norms
        self.batches.seek(self.state.position)
        step = self.state.step
        self.report(events.RolledBack(from_step=bad.step, to_step=step, batches_passed_over=passed_over, reason=reason))

    def _warm_up(self) -> None:
        """Discarded passes: compile, find a micro-batch that fits, and fix the order in which DDP sums gradients."""
        if self.compiled:
            self._phase("compiling")
        while not self._fits_on_all_ranks():
            self._halve_micro_batch()
        # the first pass of a single rank was one of the two already
        for _ in range(WARMUP_PASSES if self.dist.world_size > 1 else WARMUP_PASSES - 1):
            self._forward_backward(self._probe_batch(), 1.0, last=True)
        self.model.zero_grad(set_to_none=True)
        if self.evaluates_apart:
            self._probe_loss()  # compiled here by all ranks at once, not by rank 0 alone at the first checkpoint

    def _fits_on_all_ranks(self) -> bool:
        """Run one pass without communication. Return False if any rank ran out of memory; raises the error if a
        micro-batch of one sequence did."""
        full = False
        try:
            self._pass_beside_moments()
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.planned.micro_batch_size == 1:
                raise
            full = True
        # after the except clause: the error's traceback keeps the pass's tensors alive
        if not float(self.dist.sum(torch.full((), float(full), device=self.dist.device))):
            return True
        self.model.zero_grad(set_to_none=True)
        devices.release_memory(self.dist.device)
        return False

    def _pass_beside_moments(self) -> None:
        """One pass while a tensor as large as the optimiser's state, which is made after the warm-up, takes its place.
        Not on a CPU: memory that nobody writes to takes none there."""
        moments_bytes = self.planned.checkpoint_bytes - 4 * self.planned.parameters_trained
        size = moments_bytes if self.dist.device.type == "cuda" else 0
        moments = torch.empty(size, dtype=torch.uint8, device=self.dist.device)
        self._forward_backward(self._probe_batch(), 1.0, last=False)
        del moments

    def _halve_micro_batch(self) -> None:
        """Use the largest micro-batch of at most half the size that divides a rank's share: a step stays the same."""
        before, share = self.planned.micro_batch_size, self._sequences_per_step // self.dist.world_size
        size = next(n for n in range(before // 2, 0, -1) if share % n == 0)
        self.planned = self.planned.model_copy(update={"micro_batch_size": size, "grad_accum_steps": share // size})
        self.batches.close()
        self.batches = self._prefetcher()
        message = (
            f"micro_batch_size {before} does not fit into memory; training with {size} and "
            f"{share // size} accumulation steps, so that tokens_per_step stays {self.spec.tokens_per_step}"
        )
        self.report(events.Notice(level="warning", message=message))

    def _resume(self) -> None:
        """Take up the newest complete checkpoint, if there is one, and say how exactly it fits."""
        checkpoint = self._newest_checkpoint()
        if checkpoint is None:
            self._begin()
            return
        self._load(checkpoint)
        self.replayed = self.run.losses_after(self.state.step, self.attempt.number) if self.dist.first else {}
        stored, now = self.state.probe_loss, self._probe_loss()
        assert stored is not None, "a checkpoint without its probe loss"
        self.report(
            events.Resumed(
                step=self.state.step, path=checkpoint.path.name,
                probe_loss=stored, recomputed_loss=now, difference=now - stored,
            )
        )  # fmt: skip

    def _begin(self) -> None:
        """First weights from another run or model, where the spec says so."""
        init = self.spec.init_from
        if init is None:
            return
        origin = load_origin(self.spec, init, self.run.path.parent, self.dataset.tokenizer)
        set_weights(self.model, origin.weights)
        if origin.checkpoint is not None:
            load_optimizer_tensors(self.model, self.optimizers, self.dist, origin.checkpoint.optimizer())
            # the best so far lies in the other run's directory, so this one looks for its own
            fresh: dict[str, Any] = {
                "best_val_loss": None, "best_step": None, "evaluation_owed": False, "score_owed": False,
                "rollbacks": 0, "skipped_in_a_row": 0,
            }  # fmt: skip
            if origin.checkpoint.meta()["spec"]["data"] != self.spec.data.model_dump():
                fresh |= {"losses": [], "grad_norms": []}  # of other text: ours may be harder
            self.state = origin.checkpoint.state().model_copy(update=fresh)
        self.report(events.Notice(message=f"weights of {init.source}, going on from step {self.state.step}"))

    def _newest_checkpoint(self) -> Checkpoint | None:
        found = list_checkpoints(self.run) if self.dist.first else []
        newest: Checkpoint | None = self.dist.broadcast(found[-1] if found else None)
        return newest

    def _load(self, checkpoint: Checkpoint) -> None:
        refuse_another_shape(checkpoint.path.name, self.spec.model, checkpoint.meta()["spec"]["model"], "/model")
        began_with = (e.dataset_sha256 for e in self.run.events() if isinstance(e, events.Started))
        if next(began_with, None) not in (None, self.dataset.sha256):
            why = f"dataset {self.dataset.name} holds other tokens than this run began with"
            raise refusal("/data/dataset", f"{why}; bring those back, or start a new job with init_from")
        set_weights(self.model, checkpoint.weights())
        load_optimizer_tensors(self.model, self.optimizers, self.dist, checkpoint.optimizer())
        self.state = checkpoint.state()

    # --- looking at the model

    def _evaluate(self) -> None:
        """Validation loss; the checkpoint of this step learns of it, and whether it is the best.

        Training goes on while that checkpoint is still being written. If it cannot be, `_revert_best` takes the
        decision back: weights that were not saved are of no use as the best.
        """
        self._phase("evaluating")
        began, state = time.perf_counter(), self.state
        asked = self.spec.evaluate.eval_tokens
        val_loss = validation_loss(self._loss, self.val, asked, self.planned.micro_batch_size, self.dist)
        best = math.isfinite(val_loss) and (not self.dist.first or self.saver.has(state.step))
        best = best and (state.best_val_loss is None or not val_loss >= state.best_val_loss)
        if best:
            self.best_before = state.best_val_loss, state.best_step
            state.best_val_loss, state.best_step = val_loss, state.step
        state.evaluation_owed = False
        if self.dist.first:
            self.saver.amend(state)
        self.report(
            events.Evaluated(
                step=state.step, tokens=state.tokens, val_loss=val_loss, best=best,
                bits_per_byte=bits_per_byte(val_loss, self.val, asked, self.dataset.tokenizer),
                eval_tokens=val_windows(self.val, asked) * self.val.block_size,
                seconds=time.perf_counter() - began,
            )
        )  # fmt: skip
        self._phase("training")

    def _revert_best(self, step: int) -> None:
        """Take the best of before, whose checkpoint is kept, once more: that of `step` could not be written."""
        if self.state.best_step == step:
            self.state.best_val_loss, self.state.best_step = val_loss, best_step = self.best_before
            self.report(events.BestReverted(lost_step=step, step=best_step, val_loss=val_loss))

    def _score_hellaswag(self) -> None:
        """On a fixed sample of the items, after the last step on all of them."""
        asked, items, state = self.spec.evaluate.hellaswag, self.hellaswag_items, self.state
        self._phase("evaluating")
        if asked is not None and state.step < self.spec.max_steps:
            items = hellaswag.sample_of(items, asked.items)
        scorer = score_ours(self.model, load_tokenizer(self.dataset.tokenizer), self.dist.device)
        with self._autocast():
            self.report(hellaswag.evaluate(items, scorer, self.dist, state.step))
        state.score_owed = False
        if self.dist.first:
            self.saver.amend(state)
        self._phase("training")

    def _loss(self, *batch: Tensor) -> Tensor:
        """The training pass without its backward. Compiled, it keeps gradients on, unless so much is evaluated that
        compiling anew without them pays: see `device.evaluation_graph_pays`."""
        with self._autocast(), torch.set_grad_enabled(self.compiled and not self.evaluates_apart):
            loss: Tensor = self.forward(*batch)
        return loss.detach()

    def _probe_batch(self) -> Batch:
        """The run's first window, as often as a micro-batch has rows: its loss is the same whatever their number."""
        tokens, targets = self.train_windows.read(0, 1)
        rows, device = self.planned.micro_batch_size, self.dist.device
        return tokens.repeat(rows, 1).to(device), targets.repeat(rows, 1).to(device)

    def _probe_loss(self) -> float:
        return float(self._loss(*self._probe_batch()))

    def _sample(self) -> None:
        self._phase("evaluating")
        self.dist.run_on_first(self._report_sample)
        self._phase("training")

    def _report_sample(self) -> None:
        asked = self.spec.sample
        assert asked is not None
        tokenizer = load_tokenizer(self.dataset.tokenizer)
        seed = (self.spec.seed * 1_000_003 + self.state.step) % 2**63
        with self._autocast():
            text = sample(self.model, tokenizer, asked.prompt, asked.max_tokens, asked.temperature, seed)
        self.report(events.Sampled(step=self.state.step, prompt=asked.prompt, text=text))

    # --- what it leaves behind

    def _save(self) -> None:
        """A checkpoint of now, written while training goes on. All ranks call; rank 0 writes.

        The phase says that it is not a step that takes long where a slow disk still writes the one before.
        """
        self._phase("checkpointing")
        self.dist.run_on_first(self.saver.wait)
        moments = optimizer_tensors(self.model, self.optimizers, self.dist)
        if self.dist.first:
            self.state.probe_loss = self._probe_loss()
            shape = {
                "world_size": self.dist.world_size, "micro_batch_size": self.planned.micro_batch_size,
                "precision": self.precision, "tokenizer": self.dataset.tokenizer,
            }  # fmt: skip
            self.saver.save(self.state, dict(self.model.named_parameters()), moments, shape)  # a tied one once
        self._phase("training")

    def _export(self) -> None:
        """The best checkpoint as a folder that stock `transformers` loads."""
        name, reason = native_class(self.spec.model)
        if not self.dist.first:
            return
        checkpoint = best_checkpoint(self.run, self.state)
        if name is None or checkpoint is None:
            reason = reason or "no checkpoint has a validation loss that is a finite number"
            self.report(events.Notice(level="warning", message=f"not exported: {reason}"))
            return
        self._phase("exporting")
        export_model(self.run.export, self.spec.model, checkpoint.weights(), self.dataset.tokenizer)
        self.report(events.Exported(step=checkpoint.step, path=self.run.export.name, native_class=name))

    def _report_step(
        self, began: float, train_loss: float, lr: float, grad_norm: float, data_wait_seconds: float
    ) -> None:
        seconds = time.perf_counter() - began
        rate = self.spec.tokens_per_step / seconds
        mfu = rate / self.dist.world_size / self.peak_flops if self.peak_flops else None
        before = self.replayed.pop(self.state.step, None)
        self.report(
            events.Step(
                step=self.state.step, tokens=self.state.tokens, train_loss=train_loss, lr=lr,
                grad_norm=grad_norm, step_seconds=seconds, tokens_per_second=rate,
                data_wait_seconds=data_wait_seconds,
                mfu=mfu and mfu * self.planned.flops_per_token,
                mfu_causal=mfu and mfu * self.planned.flops_per_token_causal,
                peak_memory_bytes=devices.peak_memory_bytes(self.dist.device),
                replay_difference=None if before is None else train_loss - before,
            )
        )  # fmt: skip

    def _phase(self, phase: events.Phase) -> None:
        self.report(events.PhaseChanged(phase=phase))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.dist.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def _sequences_per_step(self) -> int:
        return self.spec.tokens_per_step // self.spec.model.block_size


if __name__ == "__main__":
    from gptcore.setup import main

    raise SystemExit(main())
