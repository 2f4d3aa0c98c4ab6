"""The reward model on disk: an ordinary Hugging Face folder plus ``prm.json``.

``prm.json`` holds what the weights do not say: head, kind, scoring position, rendering version,
default aggregation, calibration, provenance. ``tasks.json`` lists the tasks the model was trained
and validated on, so that evaluation can refuse them. A save is staged in a hidden folder first
and moved in file by file, ``prm.json`` last: a full disk leaves the old checkpoint as it was, and
weights that do not belong to their ``prm.json`` are refused on loading.

A model of the implicit head is two: the trained causal language model lies in the folder itself,
the one it is compared with in the subfolder ``reference``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prm.calibrate import Calibration
from prm.heads import Head, Kind, get_head
from prm.implicit import REFERENCE, ImplicitModel
from prm.model import Network, embedding_rows, open_tokenizer, quiet_transformers
from prm.rendering import RENDERING, Position
from trajectory.atomic import atomic_folder
from trajectory.errors import InputError
from trajectory.run import sha256_of

SCHEMA_VERSION = "1.2"
"""``major.minor`` of ``prm.json``; other majors are refused. 1.1 added isotonic calibration, 1.2 an
implicit head."""

ModelT = TypeVar("ModelT", bound=BaseModel)

METADATA = "prm.json"
TASKS = "tasks.json"


class Vocabulary(BaseModel):
    """Which tokenizer the model reads with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    fingerprint: str
    """sha256 of all (token, id) pairs."""


class Provenance(BaseModel):
    """Where the labels came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: str
    """Folder of the labels, or FORMAT:PATH of a public data set."""
    neutral: str | None = None
    """What its neutral steps were taken for; None where it had none."""
    shuffled_labels: bool = False
    """True: a control, trained on labels dealt out at random."""
    parents: Mapping[str, str]
    """Path to sha256 of everything the checkpoint was made from."""
    estimators: tuple[str, ...]
    completers: tuple[str, ...]


class Metadata(BaseModel):
    """The content of ``prm.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = SCHEMA_VERSION
    head: str
    kind: Kind
    position: Position
    rendering: int = RENDERING
    aggregation: str
    """Default aggregation of a trajectory's scores."""
    calibration: Calibration
    base_model: str
    vocabulary: Vocabulary
    provenance: Provenance
    training: Mapping[str, float | int | str | None]
    """Metrics and sizes of the training run."""
    base_log_odds: float | None = None
    """Logit of the implicit head before any action; None for others. Filled when saved."""
    weights: Mapping[str, str] = {}
    """Weight file to sha256, of subfolders too; filled when the checkpoint is saved."""


class TaskSplit(BaseModel):
    """Which tasks a model has seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[str, ...]
    validation: tuple[str, ...]
    """Used for early stopping and calibration, never for gradients."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """A loaded reward model."""

    model: Network
    tokenizer: PreTrainedTokenizerBase
    metadata: Metadata
    head: Head
    hash: str
    """sha256 of ``prm.json``, which holds the hashes of the weights."""


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Fingerprint a tokenizer's vocabulary, added tokens included."""
    pairs = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    return Vocabulary(size=len(tokenizer), fingerprint=digest)


def save_checkpoint(
    folder: str | Path,
    *,
    model: Network,
    tokenizer: PreTrainedTokenizerBase,
    metadata: Metadata,
    tasks: TaskSplit,
) -> Metadata:
    """Write a reward model to a folder, replacing the one there; other files are left alone.

    Returns
    -------
    Metadata
        With the hashes of the weight files and the model's own constant.

    Raises
    ------
    OSError
        If the disk is full; the old checkpoint stays as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stale = _weight_files(folder)
    staged = folder / ".staged"
    with atomic_folder(staged) as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / TASKS).write_text(tasks.model_dump_json(indent=2) + "\n")
        weights = {
            p.relative_to(temporary).as_posix(): sha256_of(p)
            for p in sorted(temporary.rglob("*.safetensors"))
        }
        constant = model.base_log_odds if isinstance(model, ImplicitModel) else None
        metadata = metadata.model_copy(update={"weights": weights, "base_log_odds": constant})
        (temporary / METADATA).write_text(metadata.model_dump_json(indent=2) + "\n")
    names = sorted(str(p.relative_to(staged)) for p in staged.rglob("*") if p.is_file())
    for name in [*(n for n in names if n != METADATA), METADATA]:  # moving needs no disk space
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(staged / name, folder / name)
    shutil.rmtree(staged)
    for name in stale - set(names):
        (folder / name).unlink(missing_ok=True)
    return metadata


def _weight_files(folder: Path) -> set[str]:
    """Name the weight files of a folder and of its reference, sharding index included."""
    return {
        str(p.relative_to(folder))
        for place in (folder, folder / REFERENCE)
        for pattern in ("*.safetensors", "*.index.json")
        for p in place.glob(pattern)
    }


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a reward model in float32 on the CPU.

    Raises
    ------
    InputError
        If the folder is missing or no reward model, was written by another major schema version,
        or its tokenizer or weights are not those it was saved with.
    """
    folder = Path(folder)
    metadata = load_metadata(folder)
    for name, recorded in metadata.weights.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != recorded:
            raise InputError(
                f"{folder / name} is not the file {METADATA} describes (an interrupted save or a "
                "changed folder): train the model again"
            )
    tokenizer = open_tokenizer(folder)
    found = vocabulary_of(tokenizer)
    if found != metadata.vocabulary:
        raise InputError(
            f"the tokenizer in {folder} is not the one this PRM was trained with "
            f"({found.size} tokens, recorded {metadata.vocabulary.size}, or other ids): restore it"
        )
    model = _load_model(folder, metadata, found)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        metadata=metadata,
        head=get_head(metadata.head),
        hash=sha256_of(folder / METADATA),
    )


def _load_model(folder: Path, metadata: Metadata, vocabulary: Vocabulary) -> Network:
    """Load the weights and check that they fit head and vocabulary."""
    head = get_head(metadata.head)
    model: Network
    if head.beta is None:
        model = _load_part(AutoModelForTokenClassification, folder)
        if model.config.num_labels != len(head.classes):
            raise InputError(
                f"the model in {folder} has {model.config.num_labels} classes, head "
                f"{metadata.head!r} needs {len(head.classes)}"
            )
    else:
        assert metadata.base_log_odds is not None
        model = ImplicitModel(
            policy=_load_part(AutoModelForCausalLM, folder),
            reference=_load_part(AutoModelForCausalLM, folder / REFERENCE),
            beta=head.beta,
            base_log_odds=metadata.base_log_odds,
        )
    rows = embedding_rows(model.reference if isinstance(model, ImplicitModel) else model)
    if vocabulary.size > rows:
        raise InputError(
            f"the base vocabulary of {folder} does not match: {vocabulary.size} tokens, but the "
            f"model embeds {rows}"
        )
    model.train(False)
    return model


def _load_part(
    kind: type[AutoModelForCausalLM] | type[AutoModelForTokenClassification], folder: Path
) -> PreTrainedModel:
    """Load the weights of one folder in float32."""
    try:
        with quiet_transformers():
            model = kind.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the weights in {folder} do not load: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def load_metadata(folder: str | Path) -> Metadata:
    """Read and check ``prm.json``.

    Raises
    ------
    InputError
        If the folder is no reward model, or one this version cannot read.
    """
    folder = Path(folder)
    obj = _read_json(folder, METADATA)
    version = obj.get("schema_version") if isinstance(obj, dict) else None
    if not isinstance(version, str) or version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise InputError(
            f"{folder / METADATA} has schema version {version}, this version reads "
            f"{SCHEMA_VERSION}: use the version that wrote it, or train again"
        )
    metadata = _validated(Metadata, obj, folder / METADATA)
    if metadata.rendering != RENDERING:
        raise InputError(
            f"{folder} was trained with rendering {metadata.rendering}, this version renders "
            f"{RENDERING}: use the version that wrote it, or train again"
        )
    try:
        head = get_head(metadata.head)
    except InputError as error:
        raise InputError(f"{folder / METADATA}: {error}") from error
    if head.kind != metadata.kind:
        raise InputError(
            f"{folder / METADATA}: head {metadata.head!r} is of kind {head.kind!r}, not "
            f"{metadata.kind!r}: restore the file, or train again"
        )
    if head.is_log_ratio != (metadata.base_log_odds is not None):
        raise InputError(
            f"{folder / METADATA}: head {metadata.head!r} "
            f"{'needs' if head.is_log_ratio else 'has no'} base_log_odds: restore the file, or "
            "train again"
        )
    return metadata


def load_tasks(folder: str | Path) -> TaskSplit:
    """Read which tasks the model was trained and validated on."""
    folder = Path(folder)
    return _validated(TaskSplit, _read_json(folder, TASKS), folder / TASKS)


def is_checkpoint(folder: str | Path) -> bool:
    """Tell whether a folder holds a complete reward model."""
    return (Path(folder) / METADATA).is_file()


def _read_json(folder: Path, name: str) -> object:
    """Read one of the folder's own files."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: give the folder `prm train --out` wrote")
    try:
        return json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a PRM (it has no {name}): give a folder `prm train --out` wrote"
        ) from None
    except ValueError as error:
        raise InputError(f"{folder / name} is not JSON: {error}") from error


def _validated(cls: type[ModelT], obj: object, path: Path) -> ModelT:
    """Build a model from JSON, with a sentence for the first thing that is wrong."""
    try:
        return cls.model_validate(obj)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {place}: {first['msg']}") from error
