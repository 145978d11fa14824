"""The explorer: records as a widget to search, browse and paint in, and to steer with by *Apply*.

All that it shows follows from one `search.State`, which it writes out as text and reads back. A
control asks `change` for another state, `change` checks it and shows it everywhere. Only `apply`
runs the model, in a thread of its own, so that it can be stopped.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from threading import Event, Thread

import numpy as np

from helpers.explorer import controls, page, records, search, steered
from helpers.explorer.card import card
from helpers.explorer.paint import region_of
from helpers.explorer.search import State

LISTED = 200  # latents in the list, at most; a search narrows it


class Stopped(Exception):
    """Raised within the model's work when it is to end."""


class Explorer:
    """A widget over `records.Records`: display `widget`, read `state`, show another by `open`.

    `load` gives the model that was recorded; the first `apply` calls it. `plain` and `steered` are
    the last images made, float32 (height, width, channels), None before the first `apply`.
    """

    def __init__(self, found: records.Records, load: Callable, state: str = ""):
        self.found, self.results = found, []
        self.plain = self.steered = None
        self._load, self._pipe = load, None
        self._made_plain: dict[tuple, np.ndarray] = {}  # the last one, by its prompt and seed
        self._dictionary = records.dictionary_of(found.run, found.dictionary)
        self._stop, self._work, self._showing = Event(), None, False
        run, n_steps = Path(found.run.name).name, found.store.sampling["num_inference_steps"]
        self.parts = controls.make(found.n_latents, found.store.grid, n_steps)
        self.widget = controls.arranged(self.parts)
        self._connect()
        self.state = State(run, found.dictionary, -1)  # of which nothing is shown yet
        start = State.parse(state) if state else State(run, found.dictionary, self._first())
        self._show(self._with_image(start))

    # --- what is shown ---

    def open(self, text: str) -> None:
        """Show the state that a text tells; ValueError, and nothing changes, for a bad one."""
        self._show(self._with_image(State.parse(text)))

    def change(self, **values) -> None:
        """Show the state with other values of its fields; ValueError as in `open`."""
        state = replace(self.state, **values)
        if {"find", "sort"} & set(values) and "latent" not in values:
            listed = self._listed(state)
            state = replace(state, latent=listed[0]) if listed else state
        self._show(state)

    def _first(self) -> int:
        return next(iter(search.best(self.found, 1)), 0)

    def _with_image(self, state: State) -> State:
        """Where a text names no image to steer, the first example of its latent."""
        if state.prompt or state.seed or state.strength:
            return state
        prompt, seed = steered.of_example(self.found, steered.checked(state, self.found).latent)
        return replace(state, prompt=prompt, seed=seed)

    def _listed(self, state: State) -> list[int]:
        if not (state.find or state.sort):
            return search.best(self.found, LISTED)
        region = region_of(state.mask, self.found.store.grid)
        return search.find(self.found, state.find, state.sort, region)

    def _show(self, state: State) -> None:
        state = steered.checked(state, self.found)
        results, before = self._listed(state), self.state
        self.state, self.results = state, results
        with self._quiet():
            self._set_controls()
            self._show_list(results)
            self.parts["text"].value = str(state)
        if state.latent != before.latent:
            record = self.found.record(state.latent)
            self.parts["page"].value = controls.framed(card(record, []), f"Latent {state.latent}")
        if (state.prompt, state.seed) != (before.prompt, before.seed):
            self._show_under_brush()
        n = len(results)
        some = f" The first {LISTED} are listed." if n > LISTED else ""
        self.say(f"{n} of {self.found.n_latents} latents.{some}" if n else "No latent is found.")

    def _set_controls(self) -> None:
        controls.set_values(self.parts, self.state, steered.window_of(self.state, self.found))

    def _show_list(self, results: list[int]) -> None:
        self.parts["columns"].value = controls.columns(page.column_of(self.state.sort))
        names = [(page.row(self.found, i, self.state.sort), i) for i in results[:LISTED]]
        own = self.parts["list"]
        if own.options != tuple(names):
            own.options = names
        own.value = self.state.latent if self.state.latent in results[:LISTED] else None

    def _show_under_brush(self) -> None:
        prompt, seed = self.state.prompt, self.state.seed
        image = self._made_plain.get((prompt, seed))
        if image is None:
            image = steered.recorded(self.found, prompt, seed)
        told = f"Image of “{prompt}”, seed {seed}" if image is not None else "An image not made yet"
        self.parts["paint"].show(image, told)

    def say(self, text: str, wrong: bool = False) -> None:
        """Write a sentence below the state."""
        self.parts["message"].value = controls.sentence(text, wrong)

    # --- the model ---

    @property
    def running(self) -> bool:
        return self._work is not None and self._work.is_alive()

    def apply(self) -> None:
        """Begin to make the plain image, unless it is there, and the steered one of `state`."""
        if self.running:
            return
        steered.check_strength(self.state)
        self._stop.clear()
        self._run_buttons(True)
        self._work = Thread(target=self._make, args=(self.state,), daemon=True)
        self._work.start()

    def stop(self) -> None:
        """Ask the model to end after its present step."""
        self._stop.set()

    def wait(self) -> None:
        """Return when nothing runs any more."""
        if self._work is not None:
            self._work.join()

    def _make(self, state: State) -> None:
        bar, said = self.parts["bar"], ("Stopped; the images are as they were.", False)
        try:
            if self._pipe is None:
                self.say("Loading the model.")
                self._pipe = self._load()
            image = state.prompt, state.seed
            if image not in self._made_plain:
                self.say("Making the plain image.")
                plain = steered.plain(state, self.found, self._pipe, self._step(0))
                self._made_plain = {image: plain}
                self._show_under_brush()
            self.say("Steering.")
            given = state, self.found, self._dictionary, self._pipe, self._step(bar.max // 2)
            self.steered, self.plain = steered.steered(*given), self._made_plain[image]
            self.parts["pictures"].value = controls.pair(self.plain, self.steered, state)
            said = ("Done.", False)
        except Stopped:
            pass
        except Exception as error:  # whatever it is, it would be out of sight in this thread
            said = (str(error) or type(error).__name__, True)
        finally:
            bar.value = 0
            self._run_buttons(False)
            self.say(*said)

    def _step(self, before: int):
        def on_step(step: int) -> None:
            if self._stop.is_set():
                raise Stopped
            self.parts["bar"].value = before + step + 1

        return on_step

    def _run_buttons(self, running: bool) -> None:
        self.parts["apply"].disabled, self.parts["stop"].disabled = running, not running
        self.parts["bar"].layout.visibility = "visible" if running else "hidden"

    # --- what the controls do ---

    def _connect(self) -> None:
        names = {f.name for f in fields(State)} - {"run", "dictionary"}
        for name in names & set(self.parts):
            self._on(name, lambda value, name=name: self.change(**{name: value}))
        self._on("text", self.open)
        self._on("list", lambda latent: latent is None or self.change(latent=latent))
        self._on("paint", lambda mask: self.change(mask=tuple(mask)), "mask")
        self._on("window", lambda pair: self.change(first=pair[0], last=pair[1]))
        clicks = {
            "like": lambda: self.change(find=f"like {self.state.latent}", sort=""),
            "before": lambda: self._turn(-1),
            "after": lambda: self._turn(1),
            "example": self._take_example,
            **{"apply": self.apply, "stop": self.stop},
        }
        for name, act in clicks.items():
            self.parts[name].on_click(lambda _, act=act: self._try(act))

    def _on(self, part: str, act: Callable, trait: str = "value") -> None:
        def changed(event) -> None:
            if not self._showing:
                self._try(lambda: act(event["new"]))

        self.parts[part].observe(changed, trait)

    def _try(self, act: Callable) -> None:
        """Do what a control asks, or say in a sentence why not."""
        try:
            act()
        except (ValueError, OSError) as error:
            with self._quiet():
                self._set_controls()
            self.say(str(error), wrong=True)

    def _turn(self, by: int) -> None:
        """The latent before or after this one in the list."""
        at = self.results.index(self.state.latent) if self.state.latent in self.results else -by
        if self.results:
            self.change(latent=self.results[int(np.clip(at + by, 0, len(self.results) - 1))])

    def _take_example(self) -> None:
        prompt, seed = steered.of_example(self.found, self.state.latent)
        self.change(prompt=prompt, seed=seed)

    @contextmanager
    def _quiet(self):
        """Controls may be set meanwhile without asking for another state."""
        before, self._showing = self._showing, True
        try:
            yield
        finally:
            self._showing = before
