"""`mepa serve`: a local web page that draws images of a model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import check_one_of
from mepa_ds.command_line.scales import Scales
from mepa_ds.errors import UserError

_MOST_PORT = 65535


@dataclass
class ServeOptions:
    """Serves a page on which anybody can draw images: classes, guidance, seed, the picture after each scale.

    Needs the extra `serve` (FastAPI and uvicorn). Nothing is asked of the network. Ctrl-C ends it.
    """

    run: Path | None = None
    """A run (its output_dir), or a project with one run: its best weights are shown, with its tokenizer."""
    weights: Path | None = None
    """Instead of --run: a directory of safetensors + config.json, a checkpoint, or VAR's var_d16.pth."""
    tokenizer: Path | None = None
    """The model's tokenizer: its directory, or VAR's vae_ch160v4096z32.pth; a run tells its own."""
    port: int = 8000
    """Port of the page; 0 takes any that is free."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 lets everybody on the network use the page, without a password."""
    scales: Scales = None
    """Sides of the token maps, such as 1 2 3 4, if VAR weights do not tell them and they are not VAR's own."""


def main(argv: list[str]) -> None:
    options = tyro.cli(ServeOptions, prog="mepa serve", args=argv)
    if not 0 <= options.port <= _MOST_PORT:
        raise UserError(f"--port: expected a number in 0..{_MOST_PORT}, got {options.port}")
    check_one_of(options.run, options.weights)
    log.make_stdout_a_log()
    try:
        from mepa_ds.serving.server import is_loopback, listening, make_app, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise UserError(
            f"mepa serve needs the package {error.name}; run: pip install 'fastapi>=0.115' 'uvicorn>=0.30'"
        ) from error
    from mepa_ds.checkpoint.run_models import find_chosen
    from mepa_ds.serving.drawing import Drawer, Shown
    from mepa_ds.tokenizer.tokenizer import Tokenizer

    server = listening(options.host, options.port)  # before the weights are read, which may take a while
    found = find_chosen(options.run, options.weights)
    device = distributed.device_of(distributed.read_launch())
    model = found.open(options.scales).to(device)
    tokenizer_path = found.tokenizer(options.tokenizer)
    tokenizer = Tokenizer.open(tokenizer_path, model.config.scales).to(device)
    is_local = is_loopback(server)
    paths = [found.source, tokenizer_path]
    weights_word, tokenizer_word = (str(path) if is_local else path.name for path in paths)  # others see no directories
    where = ["--weights", weights_word, "--tokenizer", tokenizer_word]
    title = (options.run or found.source.parent).resolve().name or "mepa_ds"
    place = "/".join(found.source.resolve().parts[-2:])
    drawer = Drawer(model, tokenizer, Shown(title, place, found.step, f"mepa sample {shlex.join(where)}"))
    host, port = server.getsockname()[:2]
    step = "" if found.step is None else f", step {found.step}"

    def ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        log.say(f"showing {found.source}{step}, {model.config.num_classes} classes", flush=True)
        if not is_local:
            log.say(
                "anybody on the network can use this page: it has no password; --host 127.0.0.1 keeps it to this "
                "machine, and `ssh -L` brings it to another",
                flush=True,
            )
        log.say(f"open http://{shown}:{port}/   (Ctrl-C ends)", flush=True)

    serve(make_app(drawer, is_local), server, drawer, ready)
    log.say("ended")


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
