"""The job spec: request body, `spec.json` of a run, argument of the model, part of a checkpoint.

One definition for all four, so nobody translates. Everything here is frozen and refuses unknown
fields. A preset is expanded while a spec is read: what is stored and shown is always explicit.
Numbers that follow from a spec are derived in `gptcore.plan`, never here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from gptcore.control_characters import CONTROL_CLASS, has_controls
from gptcore.presets import PRESETS, closest, expand, shown

VOCAB_MULTIPLE = 128  # training pads the vocabulary to this; the export cuts it off again

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
LabelKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
# shown in the JSON schema, but checked here: our messages name the way out, and pydantic's regex looks not ahead
TASK = r"^(val_loss|hellaswag(@\d{1,2})?|lm_eval:[\w.,/-]{1,200}(@\d{1,3})?)$"
_PART = "[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
HUB_PREFIX = "hf://"
SOURCE = rf"^(?!hf://)[^{CONTROL_CLASS}]*$|^hf://({_PART}/)?{_PART}(@[A-Za-z0-9._/-]+)?$"
REPO = rf"^(?!.*(--|\.\.|\.git$)){_PART}/{_PART}$"
# levels of pydantic's own in the place of an error
INNER = re.compile(r"(literal|function)\W|(constrained-)?(int|bool|str|float)$")
MOST_PROBLEMS = 20  # reported of one spec
MOST_EXAMINED = 200  # several of Pydantic's errors may be the same problem
LONGEST_NAME, LONGEST_MESSAGE = 200, 1500  # characters; a list of all field names is about 1,200


class Problem(BaseModel, frozen=True):
    """One thing wrong with a spec. `pointer` is a JSON pointer (RFC 6901) into the request body."""

    pointer: str
    message: str


class SpecError(ValueError):
    """A spec that cannot run, with every problem found and the way out of each."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("; ".join(f"{p.pointer or '/'}: {p.message}" for p in problems))


def refusal(pointer: str, message: str) -> SpecError:
    """One thing wrong, to be raised."""
    return SpecError([Problem(pointer=pointer, message=message)])


def _known_tasks(tasks: tuple[str, ...]) -> tuple[str, ...]:
    for task in tasks:
        if not re.fullmatch(TASK, task):
            raise ValueError(
                f"{shown(task)} is no task; use val_loss, hellaswag, or one of lm-evaluation-harness as lm_eval:NAME; "
                "@10 behind a name shows the model ten solved examples first"
            )
    return tasks


def _hub_accepts(repo: str) -> str:
    if len(repo) > 96 or not re.fullmatch(REPO, repo):
        raise ValueError(
            f"repo {shown(repo)} is no name the Hub accepts; use owner/name of letters, digits, '-', '_' and '.', "
            "at most 96, without '--', '..' or '.git' at the end"
        )
    return repo


def _hub_address(source: str) -> str:
    if not re.match(SOURCE, source) or source.endswith("\n"):  # before which `$` matches too
        raise ValueError(f"source {source!r} is no address on the Hub; use hf://owner/name, with @revision if you like")
    return source


def _in_order(steps: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"profile_steps {list(steps)} is no range; give the first and the last step, from 1")
    return steps


def _stay_inside(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"path {path!r} leaves the datasets root's sources folder; use a relative path")
    return path


def _without_controls(text: str) -> str:
    if has_controls(text):
        raise ValueError(f"{shown(text)} has control characters, which act on a terminal; leave them out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{shown(text)} has a lone surrogate, half a character that UTF-8 cannot write; leave it out")
    return text


_SHOWN: dict[str, Any] = {"pattern": SOURCE}
_LINE: dict[str, Any] = {"pattern": f"^[^{CONTROL_CLASS}]*$"}
Line = Annotated[str, Field(json_schema_extra=_LINE), AfterValidator(_without_controls)]
Label = Annotated[Line, Field(min_length=1, max_length=200)]
Source = Annotated[
    str,
    Field(min_length=1, max_length=500, json_schema_extra=_SHOWN),
    AfterValidator(_without_controls),
    AfterValidator(_hub_address),
]
Task = Annotated[str, Field(json_schema_extra={"pattern": TASK})]
Tasks = Annotated[tuple[Task, ...], Field(max_length=100), AfterValidator(_known_tasks)]


class Spec(BaseModel):
    # strict: true is no 1 and "3" no 3, as the JSON schema says
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return {name: _plain(value) for name, value in given.items()} if isinstance(given, dict) else given


def _plain(value: Any) -> Any:
    """JSON has no tuples, and one kind of number: 3.0 is an integer there."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return tuple(value) if isinstance(value, list) else value


def _preset_or_widths(schema: dict[str, Any]) -> None:
    del schema["required"]
    preset = {"required": ["preset"], "properties": {"preset": {"type": "string"}}}
    schema["anyOf"] = [preset, {"required": ["n_layer", "n_head", "n_embd"]}]


class ModelSpec(Spec):
    """The shape of a GPT. Defaults are the `llama` family's; a preset fills in all that is absent."""

    model_config = ConfigDict(json_schema_extra=_preset_or_widths)

    preset: str | None = Field(
        None, description="where the unset fields come from: GET /presets", json_schema_extra={"enum": [*PRESETS, None]}
    )
    vocab_size: int | None = Field(None, ge=2, le=1_000_000, description="tokens; unset: the dataset's tokenizer's")
    block_size: int = Field(1024, ge=8, le=131_072, description="context length in tokens")
    n_layer: int = Field(ge=1, le=512)
    n_head: int = Field(ge=1, le=512, description="query heads")
    n_kv_head: int = Field(ge=1, le=512, description="key/value heads; n_head must be a multiple")
    n_embd: int = Field(ge=8, le=65_536)
    head_dim: int = Field(ge=2, le=1024)
    n_hidden: int = Field(ge=8, le=262_144, description="width of the MLP")
    mlp: Literal["gelu", "swiglu", "relu2"] = "swiglu"
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plain"] = Field("rmsnorm", description="rmsnorm_plain has no gain")
    norm_eps: float = Field(1e-5, gt=0, lt=1)
    norm_placement: Literal["pre", "post"] = Field("pre", description="norm before or after the residual sum")
    position: Literal["learned", "rope", "none"] = "rope"
    rope_theta: float = Field(10_000.0, gt=1)
    rope_direction: Literal["forward", "backward"] = Field(
        "forward", description="sense of rotation: nanochat's classes turn backward"
    )
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embed_norm: bool = False
    logit_softcap: float | None = Field(None, gt=0)
    tie_embeddings: bool = True
    init: Literal["gpt2", "fan_in"] = Field(
        "gpt2", description="gpt2: N(0, 0.02), also of tied tables; fan_in: 1/sqrt(inputs), zero output projections"
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        return expand({name: _plain(value) for name, value in given.items()}) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; "
                f"set n_kv_head to a divisor of {self.n_head} (n_kv_head {self.n_head} is plain attention)"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs, so it must be even")
        return self

    @property
    def padded_vocab_size(self) -> int:
        assert self.vocab_size is not None, "vocab_size is resolved from the dataset first"
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class DataSpec(Spec):
    dataset: Name = Field(description="a prepared dataset or a built-in one: GET /datasets")


class OptimSpec(Spec):
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest.

    A group's learning rate is its peak; the schedule multiplies all groups alike.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0, lt=10, description="peak learning rate of AdamW")
    min_lr: float = Field(0.0, ge=0, description="where the schedule ends, on lr's scale")
    warmup_steps: int = Field(0, ge=0)
    warmup_from: float = Field(0.0, ge=0, le=1, description="share of lr that the warm-up rises from")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    cooldown_fraction: float = Field(0.2, gt=0, le=1, description="wsd: last share of the steps")
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    spike_sigmas: float | None = Field(
        6.0, ge=1, le=100,
        description="skip an update whose loss or gradient norm is this many standard deviations above its last 128; "
        "null: skip only what is not finite",
    )  # fmt: skip
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, ge=1e-30, description="what is less is nothing in float32")
    embed_lr: float | None = Field(None, gt=0, description="of token and position tables; unset: lr")
    head_lr: float | None = Field(None, gt=0, description="of an untied output matrix; unset: lr")
    muon_lr: float = Field(0.02, gt=0, description="muon: of the hidden matrices")
    muon_weight_decay: float = Field(0.0, ge=0)
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    muon_beta2: float | None = Field(None, ge=0, lt=1, description="NorMuon: of each neuron's mean square; null: none")
    muon_momentum_warmup_steps: int = Field(300, ge=0, description="from 0.85 up to muon_momentum")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; set min_lr at or below lr")
        return self


class HellaSwagSpec(Spec):
    every_steps: int = Field(1000, ge=1)
    items: int = Field(1000, ge=2, description="a fixed sample, in the end all")


class EvaluateSpec(Spec):
    every_steps: int = Field(250, ge=1)
    eval_tokens: int = Field(10_485_760, ge=1, description="the same validation tokens each time")
    hellaswag: HellaSwagSpec | None = Field(None, description="while training")
    final_tasks: Tasks = Field((), description="of an eval job that follows, on the best checkpoint")


class CheckpointSpec(Spec):
    every_steps: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1, description="newest ones kept, beside the best")


class SampleSpec(Spec):
    every_steps: int = Field(1000, ge=1)
    prompt: str = Field("", max_length=10_000)
    max_tokens: int = Field(128, ge=1, le=4096)
    temperature: float = Field(0.8, ge=0)


class InitSpec(Spec):
    """Where the first weights come from."""

    source: Source = Field(description="a job id, a Hub folder in the runs root, or hf://owner/name")
    optimizer: bool = Field(False, description="also its optimiser state and counters: extends the run")


class PublishTarget(Spec):
    """Where on the Hugging Face Hub a model goes, and as what."""

    repo: Annotated[str, AfterValidator(_hub_accepts)] = Field(
        description="owner/name; the worker's TRAINMASTER_HF_NAMESPACES must list the owner",
        json_schema_extra={"pattern": REPO, "maxLength": 96},
    )
    private: bool = True
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of the weights in the files")
    license: Line | None = Field(None, max_length=100, description="the Hub's name of it, for the model card: mit, ...")


class ResourcesSpec(Spec):
    pool: Name = "default"
    nodes: int = Field(1, ge=1, le=1024)
    ranks_per_node: int = Field(1, ge=1, le=1024, description="processes a node, one a GPU")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_duration_seconds: float | None = Field(None, gt=0, description="ends the run with a checkpoint")
    priority: int = Field(0, ge=-100, le=100)


class JobBase(Spec):
    name: Name
    labels: dict[LabelKey, Label] = Field({}, max_length=32, json_schema_extra={"additionalProperties": False})
    resources: ResourcesSpec = ResourcesSpec()


class TrainSpec(JobBase):
    kind: Literal["train"]
    model: ModelSpec
    data: DataSpec
    optim: OptimSpec
    max_steps: int = Field(ge=1, le=100_000_000, description="optimiser updates")
    tokens_per_step: int = Field(ge=8, le=2**40, description="tokens of one update, over all ranks")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="sequences per rank per forward pass"
    )
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool | Literal["auto"] = Field("auto", description="auto: on a CPU only runs long enough to win it back")
    activation_checkpointing: bool = False
    seed: int = Field(1337, ge=0, lt=2**63)
    evaluate: EvaluateSpec = EvaluateSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    sample: SampleSpec | None = None
    init_from: InitSpec | None = None
    profile_steps: Annotated[tuple[int, int], AfterValidator(_in_order)] | None = Field(
        None, description="first and last step traced by torch.profiler"
    )
    publish: PublishTarget | None = Field(None, description="the best checkpoint, by a job that follows")

    @property
    def world_size(self) -> int:
        return self.resources.nodes * self.resources.ranks_per_node


class SourceSpec(Spec):
    """Where a dataset's text comes from. Paths stay inside the datasets root's `sources/`."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"format": {"const": "hub"}}},
            "then": {"required": ["repo"], "properties": {"repo": {"type": "string"}}},
            "else": {"properties": {"repo": {"type": "null"}}},
        }
    )

    format: Literal["text", "jsonl", "parquet", "hub", "shards"]
    path: Annotated[Line, Field(min_length=1, max_length=500), AfterValidator(_stay_inside)] = Field(
        description="file or folder, relative; hub: a glob of its files"
    )
    repo: Line | None = Field(None, max_length=200, description="hub: the dataset, owner/name")
    field: Line = Field("text", max_length=100, description="jsonl, parquet, hub: the text's column")

    @model_validator(mode="after")
    def _repo_for_hub(self) -> Self:
        if (self.format == "hub") != (self.repo is not None):
            raise ValueError('repo goes with format "hub", and only with it: the dataset, owner/name')
        return self


class PrepareSpec(JobBase):
    """Text to token shards: `datasets/{dataset}/` with a `dataset.json`."""

    kind: Literal["prepare"]
    dataset: Name
    source: SourceSpec
    tokenizer: Literal["bytes", "gpt2"] = "gpt2"
    val_fraction: float = Field(0.01, gt=0, lt=1, description="share of documents held out")
    max_tokens: int | None = Field(None, ge=1, description="at most this many tokens, both splits together")
    shard_tokens: int = Field(100_000_000, ge=1024, lt=2**31, description="at most, in a file")


class SourceModel(JobBase):
    """A job about a model that exists. `parent` is what a train job's own children say for its id."""

    source: Source = Field(description="a train job's id, a Hub folder in the runs root, or hf://owner/name")
    step: int | None = Field(None, ge=0, description="of a job's checkpoint; null: its best")


class EvalSpec(SourceModel):
    kind: Literal["eval"]
    tasks: Tasks = Field(min_length=1)
    limit: int | None = Field(None, ge=2, description="only so many items of each task, the first ones")
    dataset: Name | None = Field(None, description="val_loss: another than the job's own")
    eval_tokens: int | None = Field(None, ge=1, description="val_loss: other than the job's own")


class PublishSpec(SourceModel, PublishTarget):
    """Export, check, upload: one commit on `main`, tagged step-N."""

    kind: Literal["publish"]


AnySpec = TrainSpec | PrepareSpec | EvalSpec | PublishSpec
JobSpec = Annotated[AnySpec, Field(discriminator="kind")]
_JOB_SPEC: TypeAdapter[AnySpec] = TypeAdapter(JobSpec)
KINDS = ("train", "prepare", "eval", "publish")


def children_of(spec: TrainSpec) -> list[EvalSpec | PublishSpec]:
    """The jobs that follow a train job: on its best checkpoint, in its pool."""
    resources = spec.resources.model_copy(update={"nodes": 1, "ranks_per_node": 1, "max_duration_seconds": None})
    common: dict[str, Any] = {"labels": spec.labels, "resources": resources, "source": "parent"}
    children: list[EvalSpec | PublishSpec] = []
    if spec.evaluate.final_tasks:
        tasks = spec.evaluate.final_tasks
        children.append(EvalSpec(kind="eval", name=f"{spec.name[:90]}-eval", tasks=tasks, **common))
    if spec.publish is not None:
        target = spec.publish.model_dump()
        children.append(PublishSpec(kind="publish", name=f"{spec.name[:90]}-publish", **common, **target))
    return children


def parse_spec(data: object) -> AnySpec:
    """A spec from decoded JSON. Raises SpecError naming each field, its value and the way out."""
    try:
        return _JOB_SPEC.validate_python(data)
    except ValidationError as error:
        raise SpecError(problems_of(error.errors(include_url=False))) from error


def read_spec(path: Path) -> AnySpec:
    """Return the spec of a JSON file in UTF-8. Raises SpecError, also for text that is not JSON."""
    try:
        data = json.loads(path.read_text("utf-8-sig"))  # Windows editors write a byte-order mark
    except ValueError as error:
        raise refusal("", f"{path} is not JSON: {error}") from error
    return parse_spec(data)


def problems_of(errors: Sequence[Any], root: tuple[str, ...] = ()) -> list[Problem]:
    """Return Pydantic's errors as problems: JSON pointer, the value, what would be right.

    `root` is the prefix a framework puts before the location ("body" in FastAPI). At most MOST_PROBLEMS are
    returned, so that neither the work nor the answer grows with a spec; the last one then counts the others.
    """
    problems: dict[Problem, None] = {}
    for examined, error in enumerate(errors[:MOST_EXAMINED]):
        if len(problems) == MOST_PROBLEMS - 1 and (left := len(errors) - examined) > 1:
            problems[Problem(pointer="", message=f"{left:,} more problems are not listed; correct these first")] = None
            break
        problems[_problem(error, root)] = None
    return list(problems)


def _problem(error: Any, root: tuple[str, ...]) -> Problem:
    path = list(error["loc"])
    if tuple(path[: len(root)]) == root:
        path = path[len(root) :]
    if path and path[0] in KINDS:  # the discriminator's own level is not in the document
        path = path[1:]
    path = [cut(str(p), LONGEST_NAME) for p in path if not (isinstance(p, str) and INNER.match(p))]
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append("kind")
    if error["type"] == "value_error":  # a check of several fields says first which one to change
        first = str(error["ctx"]["error"]).split(" ", 1)[0]
        path = path if path and path[-1] == first else [*path, *([first] if first in _all_fields() else [])]
    pointer = "".join("/" + str(p).replace("~", "~0").replace("/", "~1") for p in path)
    return Problem(pointer=cut(pointer, LONGEST_MESSAGE), message=cut(_say(error, path), LONGEST_MESSAGE))


def _say(error: Any, path: list[Any]) -> str:
    field = str(path[-1]) if path else "the body"
    match error["type"]:
        case "missing":
            return f"{field} is missing; it is required"
        case "extra_forbidden":
            return f"{field} is no field here; {closest(field, _all_fields())}"
        case "union_tag_not_found":
            return f"kind is missing; use one of {', '.join(KINDS)}"
        case "union_tag_invalid":
            return f"kind {shown(error['ctx']['tag'])} is unknown; use one of {', '.join(KINDS)}"
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            return f"{field} {shown(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def cut(text: str, longest: int) -> str:
    """Return the text with at most `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _all_fields() -> list[str]:
    """Every field name of every spec, for suggestions."""
    found: dict[str, None] = {}
    waiting: list[type[BaseModel]] = [Spec]
    while waiting:
        spec = waiting.pop()
        found |= dict.fromkeys(spec.model_fields)
        waiting += spec.__subclasses__()
    return list(found)
