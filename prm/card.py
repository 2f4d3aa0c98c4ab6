"""The model card, made from what is known of a checkpoint, and the way to the hub.

Nothing in a card is typed by hand: it is made from ``prm.json`` and, where it lies beside, from
the report of ``prm evaluate``. What was not measured is said to be not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from prm.calibrate import Calibration
from prm.checkpoint import Metadata, load_metadata
from prm.heads import get_head
from prm.metrics import show_estimate
from trajectory.atomic import atomic_path
from trajectory.errors import InputError

CARD = "README.md"
REPORT = Path("evaluation") / "metrics.json"
"""Where ``prm evaluate`` writes by default, inside the checkpoint's folder."""

_MEANINGS = {
    "value": "the probability that the agent ends with the right answer from there",
    "correctness": "the probability that the step itself is right",
}
_KEPT_HERE = [".*", "*/.*", "lock", "*.log"]
"""What is no part of the model."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Where curves and the finished checkpoint go."""

    track: Literal["wandb", "jsonl", "none"] = "none"
    """Where curves go."""
    push_to_hub: str | None = None
    """Hub repository (OWNER/NAME) for the finished checkpoint with a model card; the token comes
    from HF_TOKEN or `hf auth login`. On a finished folder it only writes the card and pushes."""

    def __post_init__(self) -> None:
        if self.push_to_hub is None:
            return
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        try:
            validate_repo_id(self.push_to_hub)
        except HFValidationError as error:
            raise InputError(f"--push-to-hub {self.push_to_hub!r}: {error}") from error

    def check_token(self) -> None:
        """Refuse before anything is trained if the push could not work.

        Raises
        ------
        InputError
            If a push is asked for and there is no token.
        """
        from huggingface_hub import get_token

        if self.push_to_hub is not None and get_token() is None:
            raise InputError(
                "--push-to-hub needs a token: set HF_TOKEN, or log in with `hf auth login`"
            )


def make_card(folder: str | Path, *, repo: str | None = None) -> str:
    """Make the model card of a checkpoint.

    Parameters
    ----------
    folder : str or Path
        What `prm train` wrote, with the report of `prm evaluate` in it or not.
    repo : str, optional
        Hub repository to name in the example.

    Returns
    -------
    str
        Markdown with the hub's front matter.

    Raises
    ------
    InputError
        If the folder is no reward model, or the report in it cannot be read.
    """
    folder = Path(folder)
    metadata = load_metadata(folder)
    report = _read_report(folder / REPORT)
    environment = Environment(
        loader=PackageLoader("prm", "."),
        autoescape=False,  # noqa: S701 - Markdown, made of our own numbers
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    attacks = report.get("attacks") or {}
    return environment.get_template("card.md.jinja").render(
        front=_front_matter(metadata),
        base=_public_name(metadata.base_model),
        labels=_public_name(metadata.provenance.labels),
        meaning=_MEANINGS[metadata.kind],
        position=metadata.position,
        repo=repo,
        aggregation=metadata.aggregation,
        training=_training(metadata),
        provenance=metadata.provenance,
        sections=_section_rows(report),
        counts=report.get("counts", {}),
        calibration=describe_calibration(metadata.calibration),
        attacks=_attack_rows(attacks),
        epsilon=attacks.get("epsilon"),
        head=metadata.head,
        beta=get_head(metadata.head).beta,
        kind=metadata.kind,
        rendering=metadata.rendering,
        schema=metadata.schema_version,
        parents=[(Path(path).name, digest) for path, digest in metadata.provenance.parents.items()],
    )


def _public_name(source: str) -> str:
    """Return a hub id as it is, and of a folder of one's own only its name."""
    path = Path(source)
    return path.name if path.is_absolute() or path.exists() else source


def _read_report(path: Path) -> dict[str, Any]:
    """Read an evaluation report; empty if there is none."""
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; run `prm evaluate` again") from error
    return report if isinstance(report, dict) else {}


def _front_matter(metadata: Metadata) -> str:
    """Write the hub's metadata."""
    from huggingface_hub import ModelCardData

    is_pair = get_head(metadata.head).is_log_ratio
    is_local = Path(metadata.base_model).exists()  # a folder of one's own means nothing elsewhere
    data = ModelCardData(
        base_model=None if is_local else metadata.base_model,
        library_name="transformers",
        pipeline_tag="text-generation" if is_pair else "token-classification",
        tags=["process-reward-model", "reward-model", "agents", "tool-use", "toolprm"],
    )
    return data.to_yaml().strip()


def _training(metadata: Metadata) -> Mapping[str, float | int | str | None]:
    """Return the numbers of the training run, those that old checkpoints lack as unknown."""
    needed = {
        "train_trajectories", "train_tasks", "held_out_trajectories", "held_out_tasks",
        "dropped_long", "dropped_unlabelled",
    }  # fmt: skip
    unknown = dict.fromkeys(needed, "unknown")
    nothing = {"held_out_nll": float("nan"), "base_rate_nll": float("nan")}
    return {**unknown, **nothing, **metadata.training}


def _section_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay out the sections of a report."""
    return [
        {
            "section": name.replace("_", " "),
            "n": section["items"],
            "metric": metric,
            "prm": show_estimate(found),
            "baseline": show_estimate(section.get("baseline", {}).get(metric)),
        }
        for name, section in report.get("sections", {}).items()
        for metric, found in section["prm"].items()
    ]


def _attack_rows(attacks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay out the attacks of a report."""
    return [
        {
            "name": name.replace("_", " "),
            "n": found["trajectories"],
            "rate": show_estimate(found["rate"]),
        }
        for name, found in attacks.get("by_attack", {}).items()
    ]


def describe_calibration(calibration: Calibration) -> str:
    """Say in a sentence how scores are calibrated and what that changed."""
    if not calibration.fitted:
        return f"Scores are not calibrated ({calibration.reason or 'no reason is recorded'})."
    fitted = (
        f"Scores are calibrated ({calibration.method}) on {calibration.positions} held-out "
        f"positions: expected calibration error {calibration.ece_before:.4f} before, "
    )
    if calibration.ece_cross_fitted is not None:
        return (
            f"{fitted}{calibration.ece_cross_fitted:.4f} after (each task by a map fitted on "
            "other tasks)."
        )
    return (
        f"{fitted}{calibration.ece_after:.4f} after (on the same positions, so the second figure "
        "flatters)."
    )


def push(folder: Path, repo: str) -> str:
    """Write the model card into a checkpoint's folder and push the folder to the hub.

    Returns
    -------
    str
        Address of the repository.

    Raises
    ------
    InputError
        If the hub cannot be reached or refuses; the folder is complete, card included.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(make_card(folder, repo=repo))
    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=_KEPT_HERE,
            commit_message="Process reward model by toolprm",
        )
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the push to {repo} failed ({first}); nothing is lost: the checkpoint and its card "
            f"are complete in {folder}, and the same command pushes again"
        ) from error
    return str(address)
