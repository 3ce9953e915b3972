"""Weights & Biases and trackio, which work beside a run: a thread makes all calls to their libraries."""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from mepa_ds import log
from mepa_ds.files import write_text
from mepa_ds.runtime.trackers.tracker import Pixels, in_a_line, rests
from mepa_ds.safety.secrets import redacted

# Sending the rest of the numbers at the end of a run takes a while. Once the service is killed, little is left to do.
_CLOSE_SECONDS, _KILLED_SECONDS = 60.0, 5.0
_SERVICE = "wandb-core"


class _Service:
    """The run of an output_dir, which is the same for every start. A library that is dead or hangs holds up no run."""

    name = ""
    """Of the recipe's key and of the library, as a warning names them."""

    def __init__(self, project: str, output_dir: Path, recipe: dict[str, Any]):
        self._project, self._output_dir, self._recipe = project, output_dir, _for_others(recipe)
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._resting = False
        self._library: Any = None
        self._run: Any = None
        self._tasks.put(self._start)
        self._thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
        self._thread.start()

    def add(self, scalars: dict[str, float], step: int) -> None:
        if not self._resting:
            self._tasks.put(lambda: self._show(scalars, step))

    def add_picture(self, name: str, pixels_HW3: Pixels, step: int) -> None:
        if not self._resting:
            self._tasks.put(lambda: self._show({name: self._library.Image(pixels_HW3)}, step))

    def rewind(self, step: int) -> None:
        """Does nothing: a service's own counter cannot go back. Some steps appear twice."""

    def close(self) -> None:
        """Waits until all is sent, for about a minute at most."""
        self._tasks.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._rest(f"has not finished within {_CLOSE_SECONDS:.0f} seconds")
            self._kill()
            self._thread.join(_KILLED_SECONDS)

    def _work(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                task()
            self._run.finish()
        except (Exception, SystemExit) as error:
            self._rest(f"fails ({in_a_line(error)})")
        with suppress(Exception, SystemExit):
            self._leave()

    def _identifier(self, name: str) -> str:
        """Returns the identifier of this output_dir, which its first start draws."""
        path = self._output_dir / name
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        return path.read_text().strip()

    def _rest(self, what: str) -> None:
        if not self._resting:
            self._resting = True
            rests(f"{self.name} {what}")

    def _start(self) -> None:
        """Sets `_library` and `_run`."""
        raise NotImplementedError

    def _show(self, values: dict[str, Any], step: int) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        """Puts the library in order, so that it says nothing when Python ends."""

    def _kill(self) -> None:
        """Ends what would outlive the run."""


class Wandb(_Service):
    """Weights & Biases: offline unless WANDB_MODE says otherwise, in RUN/wandb.

    The library starts a service process and talks to it. A batch system that asks a run to stop sends its signal to the
    service too, which ends it.
    """

    name = "log.wandb_project: Weights & Biases"

    def _start(self) -> None:
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # empty means unset, but the library rejects it
        import wandb

        self._library = wandb
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=self._project,
            id=self._identifier("wandb_id"),
            resume="allow",
            mode=mode,
            dir=str(self._output_dir),
            config=self._recipe,
            # Otherwise it also sends the command line, this machine's name, and the repository around the run.
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True, disable_git=True, save_code=False),
        )
        # The counter of wandb cannot go back, but a resumed run trains some steps again.
        self._run.define_metric("*", step_metric="step")
        if mode == "online" and self._run.url:
            log.note(f"wandb: {self._run.url}")

    def _show(self, values: dict[str, Any], step: int) -> None:
        self._run.log({"step": step, **values})

    def _leave(self) -> None:
        if self._library is not None:
            self._library.teardown()  # or it would run when Python ends, and complain of a dead service

    def _kill(self) -> None:
        """Kills the service. It would keep the run's output open, so that readers would wait for ever."""
        with suppress(psutil.Error):
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    if child.name() == _SERVICE:
                        child.kill()


class Trackio(_Service):
    """trackio: a database on this machine, which `trackio show --project PROJECT` shows. It needs no network.

    TRACKIO_DIR is the place of the database; TRACKIO_SPACE_ID and TRACKIO_SERVER_URL send the numbers elsewhere.
    """

    name = "log.trackio_project: trackio"

    def _start(self) -> None:
        import trackio
        import trackio.run

        for module in (trackio, trackio.run, trackio.utils):
            vars(module)["print"] = _unheard  # it greets, and says how to see the dashboard, on stdout
            if "_emit_nonfatal_warning" in vars(module):
                vars(module)["_emit_nonfatal_warning"] = self._lost
        self._library = trackio
        self._run = trackio.init(
            project=self._project,
            name=f"{self._output_dir.name}-{self._identifier('trackio_id')}",
            resume="allow",
            config=self._recipe,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def _show(self, values: dict[str, Any], step: int) -> None:
        self._run.log(values, step=step)

    def _lost(self, message: str, *_: Any, **__: Any) -> None:
        """What the library would warn of, and go on."""
        self._rest(f"warns ({' '.join(str(message).split())[:300]})")


def _for_others(recipe: Any) -> Any:
    """A recipe as a service gets it: without secrets, and of whole paths only their last part."""
    if isinstance(recipe, dict):
        return {key: _for_others(value) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [_for_others(value) for value in recipe]
    if isinstance(recipe, str):
        return redacted(Path(recipe).name if recipe.startswith("/") else recipe)
    return recipe


def _unheard(*_: Any, **__: Any) -> None:
    """In the place of `print`."""
