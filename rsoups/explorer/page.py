"""The explorer's page in Gradio: its components, and the functions that they call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gradio as gr

from rsoups.common.assets import asset
from rsoups.common.errors import RsoupsError
from rsoups.data.prompts import question_of
from rsoups.explorer.sweep_folder import LONGEST_PROMPT
from rsoups.explorer.tasting import LONGEST, Question, Reading, Settings, Tasting, rescaled
from rsoups.explorer.view import advice, axes_of, first_axes, header, plot, question, reading, readout
from rsoups.fronts.points import Point

_QUEUED = 32  # calls that may wait for the model
_HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, **_HIDDEN}
_AT_ONCE: dict[str, Any] = {"queue": False, **_HIDDEN}
_TYPED, _ANY = "this prompt", "a random prompt of the sweep"
_CHOICES = {"a": "A is better", "tie": "Tie", "b": "B is better"}


class Page:
    """The page of one sweep. λ are the values of its sliders, in the order of the ingredients.

    Attributes:
        blocks: Gradio's app.
    """

    def __init__(self, tasting: Tasting, publish: bool):
        self._tasting, self._front = tasting, tasting.front
        title = "Rewarded soups: " + ", ".join(self._front.rewards)
        with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML(header(self._front, tasting.names), elem_id="header")
            with gr.Row(elem_id="halves"):
                with gr.Column(elem_id="choose", scale=5, min_width=320):
                    self._add_front()
                with gr.Column(elem_id="taste", scale=6, min_width=320):
                    self._add_prompt()
                    with gr.Tabs():
                        with gr.Tab("Read"):
                            self._add_reading()
                        if len(self._front.soups) > 1:
                            with gr.Tab("Vote"):
                                self._add_vote()
                        if publish:
                            with gr.Tab("Keep"):
                                self._add_keep()
        self.blocks.queue(max_size=_QUEUED, api_open=False)

    def _add_front(self) -> None:
        """The front, the expected rewards, the sliders, and the choice of axes unless there are just two rewards."""
        first, axes = self._tasting.mix([1.0] * len(self._tasting.names)), first_axes(self._front)
        svg, figures = self._draw(*axes, *first.values())
        self._plot = gr.HTML(svg, elem_id="plot", js_on_load=asset("explorer.js"))
        self._drawn = [self._plot, gr.HTML(figures, elem_id="readout")]
        self._sliders = [
            gr.Slider(0, 1, round(value, 3), step=0.01, label=name, elem_classes="lambda", buttons=[])
            for name, value in first.items()
        ]
        with gr.Row(visible=len(self._front.rewards) != 2):
            choices = axes_of(self._front)
            self._axes = [
                gr.Dropdown(choices, value=axes[0], label="Across"),
                gr.Dropdown(choices, value=axes[1], label="Up"),
            ]

        inputs = [*self._axes, *self._sliders]
        self._changes = [self._plot.choose(self._choose, self._axes, [*self._sliders, *self._drawn], **_AT_ONCE)]
        for number, slider in enumerate(self._sliders):
            outputs = [other for other in self._sliders if other is not slider] + self._drawn
            moved = partial(self._moved, number)
            self._changes.append(slider.input(moved, inputs, outputs, trigger_mode="always_last", **_AT_ONCE))
        for axis in self._axes:
            axis.input(self._draw, inputs, self._drawn, **_AT_ONCE)

    def _add_prompt(self) -> None:
        """The prompt and the settings of the generation."""
        frame, sweep = self._tasting.frame, self._tasting.sweep
        choices = [(question_of(prompt), frame.typed(prompt)) for prompt in sweep.prompts]
        self._typed = gr.Textbox(
            choices[0][1],
            label="Prompt",
            info=f"Asked as: {frame.before}…{frame.after}" if frame.before or frame.after else None,
            lines=2,
            max_lines=8,
            elem_id="prompt",
            max_length=LONGEST_PROMPT,
        )
        chosen = gr.Dropdown(choices, value=choices[0][1], label="or one of the sweep's", elem_id="sweeps")
        chosen.input(str, chosen, self._typed, **_AT_ONCE)

        heat, longest = min(2.0, sweep.settings.temperature or 0), min(LONGEST, sweep.settings.max_new_tokens or 64)
        with gr.Accordion("How to generate", open=False):
            self._settings = [
                gr.Slider(0, 2, heat, step=0.05, label="Temperature", info="0: always the likeliest", buttons=[]),
                gr.Slider(1, LONGEST, longest, step=1, label="Longest response, in tokens", buttons=[]),
                gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", info="the same for every text"),
            ]

    def _add_reading(self) -> None:
        """Responses at λ, of each ingredient alone and of the base. After the first ones, those at λ follow the sliders."""
        button = gr.Button("Generate", variant="primary", elem_id="generate")
        texts = gr.HTML(reading(None, self._tasting.names), elem_id="texts")
        known = gr.State(None)
        inputs, outputs = [self._typed, *self._settings, known, *self._sliders], [texts, known]
        gr.on([button.click, self._typed.submit], self._read, inputs, outputs, **_MODEL)
        self._again: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "trigger_mode": "always_last", **_MODEL}
        for change in self._changes:
            change.then(self._read_again, **self._again)

    def _add_vote(self) -> None:
        """Two responses, the choice between them, and the λ that all votes suggest."""
        about = gr.Radio([_ANY, _TYPED], value=_ANY, label="Compare two soups on", elem_id="about")
        ask = gr.Button("Show two texts", variant="primary", elem_id="ask")
        texts = gr.HTML(question(None), elem_id="question")
        with gr.Row(elem_id="choices"):
            buttons = {
                choice: gr.Button(label, interactive=False, elem_id=f"choice-{choice}", min_width=90)
                for choice, label in _CHOICES.items()
            }
        suggested = gr.HTML(self._advice, elem_id="advice")
        go = gr.Button("Go to this λ", visible=self._tasting.suggestion is not None, elem_id="go", size="sm")

        pair = gr.State(None)
        outputs = [texts, pair, *buttons.values()]
        ask.click(self._ask, [about, self._typed, *self._settings], outputs, **_MODEL)
        for choice, button in buttons.items():
            button.click(partial(self._vote, choice), [pair], [*outputs, suggested, go], **_AT_ONCE)
        followed = go.click(self._follow, self._axes, [*self._sliders, *self._drawn], **_AT_ONCE)
        followed.then(self._read_again, **self._again)

    def _add_keep(self) -> None:
        """Save or publish the soup at λ."""
        gr.Markdown("The soup at the chosen λ, as an ordinary PEFT adapter with its lineage.")
        with gr.Group():
            name = gr.Textbox("my-soup", label="Name", info="in the sweep's folder, under soups/", elem_id="soup-name")
            save = gr.Button("Save this soup", elem_id="save")
        saved = gr.Markdown(elem_id="saved")
        with gr.Group():
            repo = gr.Textbox(label="Repository on the Hub", placeholder="user/name", elem_id="repo")
            private = gr.Checkbox(True, label="Private")
            push = gr.Button("Push this soup", elem_id="push")
        pushed = gr.Markdown(elem_id="pushed")

        once: dict[str, Any] = {"concurrency_limit": 1, "show_progress": "minimal", "api_visibility": "private"}
        save.click(self._save, [name, *self._sliders], saved, **once)
        push.click(self._push, [repo, private, *self._sliders], pushed, **once)

    # The functions that components call.

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """A context in which errors of rsoups are shown on the page, without names of folders."""
        try:
            yield
        except RsoupsError as error:
            raise gr.Error(self._tasting.plain(error), title="That did not work", print_exception=False) from None

    def _moved(self, number: int, x: str, y: str, *values: float) -> list[Any]:
        new = rescaled(values, number, values[number])
        others = [round(value, 3) for i, value in enumerate(new) if i != number]
        return [*others, *self._draw(x, y, *new)]

    def _draw(self, x: str, y: str, *values: float) -> list[str]:
        lambdas, suggestion = self._tasting.mix(values), self._tasting.suggestion
        advised = suggestion.point.lambdas if suggestion else None
        return [plot(self._front, x, y, lambdas, advised), readout(self._front, lambdas)]

    def _choose(self, x: str, y: str, event: gr.EventData) -> list[Any]:
        soups = self._front.soups
        return self._go(soups[min(max(0, int(event.at)), len(soups) - 1)], x, y)

    def _follow(self, x: str, y: str) -> list[Any]:
        suggestion = self._tasting.suggestion
        return self._go(suggestion.point if suggestion else self._front.soups[0], x, y)

    def _go(self, point: Point, x: str, y: str) -> list[Any]:
        sliders = [round(value, 3) for value in point.weights]
        return [*sliders, *self._draw(x, y, *point.weights)]

    def _read(self, typed: str, heat: float, longest: int, seed: int, known: Reading | None, *values: float) -> Any:
        lambdas = self._tasting.mix(values)
        with self._plainly():
            settings = Settings(heat, int(longest), int(seed or 0))
            for now in self._tasting.read(typed, lambdas, settings, known):
                yield reading(now, self._tasting.names, lambdas), now

    def _read_again(self, typed: str, heat: float, longest: int, seed: int, known: Any, *values: float) -> Any:
        if known is None:
            yield gr.skip(), gr.skip()
        else:
            yield from self._read(typed, heat, longest, seed, known, *values)

    def _ask(self, about: str, typed: str, heat: float, longest: int, seed: int) -> Any:
        with self._plainly():
            settings = Settings(heat, int(longest), int(seed or 0))
            for pair in self._tasting.ask(typed if about == _TYPED else None, settings):
                yield question(pair), pair, *[gr.update(interactive=not pair.busy)] * 3

    def _vote(self, choice: str, pair: Question | None) -> list[Any]:
        if pair is None or pair.busy:
            raise gr.Error("There is nothing to choose between yet.", print_exception=False)
        with self._plainly():
            self._tasting.vote(pair, choice)
        disabled = [gr.update(interactive=False)] * 3
        return [question(pair, choice), None, *disabled, self._advice(), gr.update(visible=True)]

    def _advice(self) -> str:
        return advice(self._tasting.votes.votes, self._tasting.suggestion)

    def _save(self, name: str, *values: float) -> str:
        with self._plainly():
            return f"Saved: `{self._tasting.save(self._tasting.mix(values), name)}`"

    def _push(self, repo: str, private: bool, *values: float) -> str:
        with self._plainly():
            url = self._tasting.push(self._tasting.mix(values), repo, private)
            return f"Published: [{repo.strip()}]({url})"
