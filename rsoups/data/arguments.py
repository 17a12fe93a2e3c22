"""Command-line arguments that choose prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from rsoups.data.tasks import TASKS, Task, find_task


@dataclass(kw_only=True)
class PromptArguments:
    task: str = field(
        default="concepts",
        metadata={
            "help": "Task that writes the prompts; custom takes them from the dataset.",
            "choices": [*sorted(TASKS), "custom"],
        },
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Template of a custom task's prompts, such as 'Summarize: {article}'; the column `prompt` if unset."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "File (its last tenth is held out), folder or Hub id; the task's own dataset if unset."},
    )
    long_prompts: str = field(
        default="refuse",
        metadata={
            "help": "Treatment of prompts that leave no room for a response in the context.",
            "choices": ["refuse", "drop"],
        },
    )

    def find_task(self) -> Task:
        return find_task(self.task, self.dataset, self.template)
