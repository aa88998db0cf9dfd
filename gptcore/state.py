"""What must survive a restart beside weights and optimiser state."""

from pydantic import BaseModel, Field


class TrainState(BaseModel, ser_json_inf_nan="constants"):
    """Changes as the run goes; stands as JSON in every checkpoint (which keeps floats exactly)."""

    step: int = 0  # updates completed, skipped ones among them
    tokens: int = 0
    position: int = 0  # sequences consumed: where the loader goes on
    batches_skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    losses: list[float] = Field(default_factory=list)  # the guard's windows: the last finite steps
    grad_norms: list[float] = Field(default_factory=list)
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluation_owed: bool = False  # saved before its evaluation ran
    score_owed: bool = False  # the same of HellaSwag
    probe_loss: float | None = None  # of a fixed batch, by these very weights
