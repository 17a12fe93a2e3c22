"""The evaluation that is published with soups: a front's figures, its picture, and results for the card's metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.adapters.filenames import FRONT_FILE, PICTURE_FILE
from rsoups.adapters.lineage import Manifest, parents_of
from rsoups.common.errors import FrontError
from rsoups.common.published import scrubbed
from rsoups.data.tasks import TASKS
from rsoups.fronts.front import Front
from rsoups.fronts.points import Point

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Settings of a sweep that are published. The others may name folders of this disk.
_SETTINGS = ("task", "dataset", "temperature", "max_new_tokens", "samples", "seed")
_SAME_LAMBDA = 1e-6


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A front with the points that are published.

    Attributes:
        front: The front.
        points: Its points at the λ of the published soups.
        settings: Settings of the sweep, as far as it wrote them down.
    """

    front: Front
    points: list[Point]
    settings: dict[str, Any]

    @classmethod
    def of(cls, front: Front | str | Path, soups: Sequence[Manifest]) -> Evaluation:
        """Find soups in a front.

        Args:
            front: The front, or its records.jsonl, with the sweep's settings in the same folder.
            soups: Manifests of the soups.

        Raises:
            FrontError: The front has no point at the λ of a soup.
        """
        settings: dict[str, Any] = {}
        if not isinstance(front, Front):
            path = Path(front).with_suffix(".settings.json")
            written = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            settings = scrubbed({key: written[key] for key in _SETTINGS if written.get(key) is not None})
            front = Front.from_jsonl(front)
        return cls(front, [_point_of(front, soup) for soup in soups], settings)

    @property
    def dataset(self) -> str | None:
        """Name of the dataset of the prompts."""
        task = TASKS.get(str(self.settings.get("task")))
        return self.settings.get("dataset") or (task.dataset if task else None)

    def results(self) -> list[EvalResult]:
        """Return the first point's mean of each reward, with n and interval among its arguments."""
        return [self._result(reward) for reward in self.front.rewards]

    def _result(self, reward: str) -> EvalResult:
        from huggingface_hub import EvalResult

        point, name = self.points[0], self.dataset or "prompts"
        title, bounds = f"{reward}, mean reward", {}
        if reward in point.low:  # neither one prompt nor points read from a table have an interval
            low, high = point.low[reward], point.high[reward]
            title += f" [95% interval {low:.4g}, {high:.4g}]"
            bounds = {"low": round(low, 6), "high": round(high, 6)}
        return EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=name,
            dataset_name=f"{name}, {point.n} prompts",
            metric_type=reward,
            metric_name=title,
            metric_value=round(point.mean[reward], 6),
            metric_args={"n": point.n} | bounds | self.settings,
        )

    def write(self, folder: Path) -> None:
        """Write front.json and front.png."""
        from rsoups.reports.plots import draw_front

        fields = ("name", "lambdas", "method", "n", "mean", "low", "high")
        data = {
            "rewards": self.front.rewards,
            "prompts": len(self.front.prompts),
            "interval": "95% bootstrap over prompts",
            "points": [{name: getattr(point, name) for name in fields} for point in self.front.points],
            "settings": self.settings,
        }
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        (folder / FRONT_FILE).write_text(text, encoding="utf-8")
        draw_front(self.front).savefig(folder / PICTURE_FILE, dpi=160)


def _point_of(front: Front, soup: Manifest) -> Point:
    wanted = {ingredient["name"]: ingredient["lambda"] for ingredient in parents_of(soup)}
    for point in front.soups:
        lambdas = point.lambdas or {}
        # A sweep may have other names for the ingredients: then their order counts.
        values = [lambdas[name] for name in wanted] if lambdas.keys() == wanted.keys() else list(lambdas.values())
        if len(values) == len(wanted) and all(
            abs(a - b) < _SAME_LAMBDA for a, b in zip(values, wanted.values(), strict=True)
        ):
            return point
    raise FrontError(f"the front has no soup at λ {wanted}; it has {[point.lambdas for point in front.soups]}")
